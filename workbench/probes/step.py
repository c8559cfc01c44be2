"""What is known of one forward call while it runs, some of it still on the device."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from transformers import Cache

from workbench.trace.schema import phase_of


@dataclass(eq=False)
class Step:
    """One forward call."""

    number: int
    module: nn.Module
    """Whose call it is: the model, or its decoder where that was called directly."""
    batch: int
    q_len: int
    past: int
    given_cache: Cache | None
    device: torch.device
    ids: torch.Tensor | None
    mask: torch.Tensor | None
    padding: torch.Tensor | None
    """`[B]` padding tokens of each row, earlier ones included."""
    begun: torch.cuda.Event | None = None
    ended: torch.cuda.Event | None = None
    """Events around the call on a GPU, asked for their times when the call is written."""
    start_ns: int = 0
    duration_ns: int = 0
    logits: int = 0
    in_decoder: bool = False
    written: bool = False
    ran: Counter[int] = field(default_factory=Counter)
    """How often each layer's attention module was called."""
    attention: dict[tuple[int, int], tuple] = field(default_factory=dict)
    """By layer and which call of it: `(batch, q_len, kv_read, pairs, kernel, mask)`."""
    counted_attention: Counter[tuple[int, int]] = field(default_factory=Counter)
    """FLOPs that torch's counter saw in the attention function, where it looked."""
    unknown_attention: set[int] = field(default_factory=set)
    """Layers whose attention is neither transformers' nor one of every query and key."""
    cache: list[tuple[int, int, int]] = field(default_factory=list)
    """Rows `(layer, held_tokens, physical_bytes)`."""
    routing: list[tuple] = field(default_factory=list)
    unattributed: list[tuple[str, int]] = field(default_factory=list)
    importance: list[tuple] = field(default_factory=list)
    spans: list[tuple] = field(default_factory=list)
    pairs: dict[Any, int | torch.Tensor] = field(default_factory=dict)
    masks: list[torch.Tensor | None] = field(default_factory=list)
    """Keeps the masks alive whose ids are keys of `pairs`."""
    slots: dict[tuple, torch.Tensor | None] = field(default_factory=dict)
    """What `visible` has found, by where a mask lies: layers share a few masks."""

    @property
    def context(self) -> int:
        """Tokens of a row once the call is done."""
        return self.past + self.q_len

    def slots_read(self, layer: int) -> int:
        """Slots that an attention of the model's own reads: what is held, or the whole of a buffer of fixed size."""
        layers = self.given_cache.layers if self.given_cache is not None else []
        keys = getattr(layers[layer], "keys", None) if layer < len(layers) else None
        return self.context if keys is None else max(self.context, keys.shape[-2])

    def visible(self, mask: torch.Tensor) -> torch.Tensor | None:
        """`[B, 1, N]` whether any query sees a slot, by a mask `[B, ?, Q, N]` of booleans or of what is added to scores.

        None if all slots are seen and that costs no wait for a device.
        """
        where = (mask.data_ptr(), mask.shape)
        if where not in self.slots:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            seen = seen[:, :1].any(2)
            self.slots[where] = None if mask.device.type == "cpu" and bool(seen.all()) else seen
        return self.slots[where]

    @property
    def phase(self) -> str:
        """The phase the call belongs to."""
        return phase_of(self.q_len, self.past)
