"""Sees every attention call of a model by wrapping the attention implementation it has.

A wrapper is registered with transformers under a name of its own, the model's configs point to it while observed, and
both are put back afterwards. The wrapped implementation's mask function is registered under the same name, so the
model builds the masks it would have built.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from workbench.errors import UserError
from workbench.models.anatomy import attention_modules
from workbench.trace.pairs import causal_pairs

OBSERVED = "workbench_observed_"
"""How the names of observing wrappers start."""

_numbers = itertools.count()

AttentionCall = Callable[..., None]
"""Called as `(layer, module, query, key, mask, options)` after each attention call."""


class AttentionProbe:
    """Wraps the attention implementation of one model between `attach` and `detach`."""

    def __init__(self, model: nn.Module, on_call: AttentionCall):
        self._layers = {id(module): layer for layer, module in enumerate(attention_modules(model))}
        self._configs = attention_configs(model)
        self._on_call = on_call
        self._previous: list[str] = []
        self._name = ""
        self.implementation = ""
        """The wrapped implementation."""

    def attach(self) -> None:
        """Puts the wrapper in place. Raises UserError if the model's attention cannot be wrapped."""
        self._previous = [config._attn_implementation for config in self._configs]
        self.implementation = implementation = self._previous[0]
        if len(set(self._previous)) > 1:
            raise UserError(f"The model mixes the attention implementations {sorted(set(self._previous))}; set one for all.")
        if implementation.startswith("flex"):
            raise UserError(f"Attention {implementation!r} cannot be observed; use model.set_attn_implementation('sdpa').")
        self._name = f"{OBSERVED}{next(_numbers)}"
        AttentionInterface._global_mapping[self._name] = self._wrapper(implementation)
        masks = AttentionMaskInterface._global_mapping
        if implementation in masks:
            masks[self._name] = masks[implementation]
        for config in self._configs:
            config._attn_implementation_internal = self._name

    def detach(self) -> None:
        """Puts back what was there before."""
        for config, implementation in zip(self._configs, self._previous, strict=True):
            config._attn_implementation_internal = implementation
        AttentionInterface._global_mapping.pop(self._name, None)
        AttentionMaskInterface._global_mapping.pop(self._name, None)

    def _wrapper(self, implementation: str) -> Callable:
        registered = AttentionInterface._global_mapping.get(implementation)

        def observed(module, query, key, value, attention_mask, **kwargs):
            if hasattr(key, "attend"):
                view, key = key, key.keys
                result = view.attend(module, query, **kwargs)
            else:
                call = registered or sys.modules[type(module).__module__].eager_attention_forward
                result = call(module, query, key, value, attention_mask, **kwargs)
            layer = self._layers.get(id(module))
            if layer is not None:
                self._on_call(layer, module, query, key, attention_mask, kwargs)
            return result

        return observed


def attention_configs(model: nn.Module) -> list[Any]:
    """The config objects a model's attention modules read their implementation from."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None)]


def visible_pairs(q_len: int, kv_read: int, batch: int, mask: torch.Tensor | None) -> int | torch.Tensor:
    """Query-key pairs of one query head that the mask lets through; a device scalar if a mask must be counted."""
    if mask is None:
        return batch * causal_pairs(q_len, kv_read)
    seen = mask[..., :kv_read]
    seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    per_row = seen.sum() // (seen.shape[0] * seen.shape[1]) if seen.shape[0] == 1 else None
    return per_row * batch if per_row is not None else seen.sum() // seen.shape[1]
