"""Sees every attention call of a model where transformers looks up the attention function.

While any model is observed, `AttentionInterface` hands out its functions wrapped, and a wrapped function tells the
observers of the module that calls it. No name changes: the model, its config and its masks are those of an unobserved
run, and a module nobody observes only passes through.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn
from transformers import AttentionInterface

from workbench.errors import UserError
from workbench.models.anatomy import attention_modules
from workbench.trace.pairs import causal_pairs


class AttentionObserver(Protocol):
    """What is told of the attention calls of one model."""

    def before_attention(self, module: nn.Module) -> None:
        """The attention function is about to be called by a module."""

    def after_attention(self, layer: int, module: nn.Module, query, key, mask, options: dict[str, Any], kernel: str) -> None:
        """The attention function named `kernel` was called with these arguments."""


_ARGUMENTS = ("query", "key", "value", "attention_mask")

_lock = threading.Lock()
_observers: dict[nn.Module, tuple[tuple[int, AttentionObserver], ...]] = {}
_originals: dict[str, Callable] = {}
"""The methods of `AttentionInterface` that look a function up, as they were, while they are wrapped."""


class AttentionProbe:
    """Tells an observer of the attention calls of one model between `attach` and `detach`."""

    def __init__(self, model: nn.Module, observer: AttentionObserver):
        layers = enumerate(attention_modules(model))
        self._layers = {part: layer for layer, module in layers for part in module.modules()}
        self._implementations = {config._attn_implementation for config in attention_configs(model)}
        self._observer = observer

    def attach(self) -> None:
        """Starts to observe. Raises UserError if the model's attention cannot be observed."""
        flex = next((name for name in self._implementations if name.startswith("flex")), None)
        if flex is not None:
            raise UserError(f"Attention {flex!r} cannot be observed; use model.set_attn_implementation('sdpa').")
        with _lock:
            for module, layer in self._layers.items():
                _observers[module] = (*_observers.get(module, ()), (layer, self._observer))
            _patch()

    def detach(self) -> None:
        """Stops to observe."""
        with _lock:
            for module in self._layers:
                left = tuple(pair for pair in _observers.pop(module, ()) if pair[1] is not self._observer)
                if left:
                    _observers[module] = left
            if not _observers:
                _unpatch()


def _patch() -> None:
    for name, wrapped in _LOOKUPS.items():
        if name not in _originals:
            _originals[name] = getattr(AttentionInterface, name)
            setattr(AttentionInterface, name, wrapped)


def _unpatch() -> None:
    for name, wrapped in _LOOKUPS.items():
        if getattr(AttentionInterface, name) is not wrapped:
            continue  # somebody wrapped it once more, and needs ours
        original = _originals.pop(name)
        delattr(AttentionInterface, name)
        if getattr(AttentionInterface, name, None) is not original:
            setattr(AttentionInterface, name, original)


def _get_interface(table: AttentionInterface, attn_implementation: str, default: Callable) -> Callable:
    return _wrapped(_originals["get_interface"](table, attn_implementation, default), attn_implementation)


def _get_item(table: AttentionInterface, name: str) -> Callable:
    return _wrapped(_originals["__getitem__"](table, name), name)


_LOOKUPS: dict[str, Callable] = {"get_interface": _get_interface, "__getitem__": _get_item}
"""How a model finds its attention function: by the method, or by indexing, as code from a hub still does."""


@functools.lru_cache(maxsize=32)
def _wrapped(function: Callable, kernel: str) -> Callable:
    """The function, made to tell the observers; the few functions there are, are looked up at every layer of every call."""
    if isinstance(function, functools.partial) and function.func is _observed:
        return function
    return functools.partial(_observed, function, kernel)


def _observed(function: Callable, kernel: str, module: nn.Module, *args, **options):
    observers = _observers.get(module)
    if not observers:
        return function(module, *args, **options)
    query, key, _, mask = args if len(args) == 4 else map((dict(zip(_ARGUMENTS, args, strict=False)) | options).get, _ARGUMENTS)
    seen = key.keys if hasattr(key, "attend") else key  # an engine cache layer: its keys before the method acts
    for _, observer in observers:
        observer.before_attention(module)
    result = function(module, *args, **options)
    for layer, observer in observers:
        observer.after_attention(layer, module, query, seen, mask, options, kernel)
    return result


def attention_configs(model: nn.Module) -> list[Any]:
    """The config objects a model's attention modules read their implementation from."""
    configs = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return [config for config in configs.values() if getattr(config, "_attn_implementation", None)]


def visible_pairs(
    q_len: int, kv_read: int, batch: int, mask: torch.Tensor | None, window: int | None = None
) -> int | torch.Tensor:
    """Query-key pairs of one query head that the mask lets through; a device scalar if a mask must be counted.

    A mask `[B, N]`, as flash attention takes it, says which keys are no padding; the rest is causal. `window` is that of
    a kernel which is told the window instead of being given it as a mask.
    """
    if mask is None:
        return batch * causal_pairs(q_len, kv_read, window)
    if mask.ndim == 2:
        padding = (mask[:, -kv_read:] == 0).sum(1).tolist()
        return sum(causal_pairs(min(q_len, kv_read - empty), kv_read - empty, window) for empty in padding)
    seen = mask[..., :kv_read]
    seen = seen if seen.dtype == torch.bool else seen > torch.finfo(seen.dtype).min / 2
    per_row = seen.sum() // (seen.shape[0] * seen.shape[1]) if seen.shape[0] == 1 else None
    return per_row * batch if per_row is not None else seen.sum() // seen.shape[1]
