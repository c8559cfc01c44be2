"""Which weights a model has, as a short text: the same whenever the same model is loaded, another one after fine-tuning.

Hashed are the shape of its attention, its rotary positions, and of every tensor its name, shape and some elements spread
evenly over it. So it costs next to nothing for a model of any size; a change that misses all these elements goes unseen.
"""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from workbench.models.load import LM

_ELEMENTS = 256
_DIGITS = 16


@torch.no_grad()
def fingerprint(lm: LM) -> str | None:
    """16 hexadecimal digits, or None if a weight is not in memory, as when it is offloaded."""
    config = lm.model.config.get_text_config()
    heads = [
        (layer.attention.num_q_heads, layer.attention.num_kv_heads, layer.attention.head_dim, layer.attention.window)
        for layer in lm.anatomy.layers
    ]
    about = [config.model_type, heads, getattr(config, "rope_parameters", None)]
    digest = hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode())
    for name, tensor in sorted(lm.model.state_dict().items()):
        if tensor.is_meta:
            return None
        digest.update(f"{name} {tuple(tensor.shape)}".encode())
        flat = tensor.reshape(-1)
        spread = torch.linspace(0, max(flat.numel() - 1, 0), min(_ELEMENTS, flat.numel()), dtype=torch.float64)
        digest.update(flat[spread.long().to(flat.device)].float().cpu().numpy().tobytes())
    return digest.hexdigest()[:_DIGITS]
