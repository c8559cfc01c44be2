"""Times of the parts of a forward call: every layer, and in it attention, MLP or experts, router and norms.

On a CPU a span is `perf_counter_ns` before and after a module. A GPU works behind the Python code, so there a pair of CUDA
events is recorded too and asked for its time when the rows are written; nothing waits for the GPU while the model runs.
Spans nest: attention lies in its layer, experts in their MoE block.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from workbench.models.anatomy import attention_modules, component_modules, decoder_layers, expert_modules

Span = tuple[str, int, int, int, Any, Any]
"""Name, layer (-1: outside the layers), start_ns, duration_ns, and the CUDA events around it or None."""


def span_modules(model: nn.Module) -> dict[nn.Module, tuple[str, int]]:
    """The modules that are timed: name of their span and layer."""
    found = {module: (name, -1) for module, name in component_modules(model).items() if name in ("embedding", "lm_head")}
    norms_and_routers = {module: name for module, name in component_modules(model).items() if name in ("norm", "router")}
    experts, attention = expert_modules(model), attention_modules(model)
    for index, block in enumerate(decoder_layers(model)):
        found[block] = ("layer", index)
        for child in block.children():
            found[child] = ("mlp", index)
        for module in block.modules():
            if module in norms_and_routers:
                found[module] = (norms_and_routers[module], index)
        found[attention[index]] = ("attention", index)
        if index in experts:
            found[experts[index]] = ("experts", index)
    return found


class SpanProbe:
    """Times modules between `attach` and `detach`; `take` gives what was timed since the last call, by thread."""

    def __init__(self, model: nn.Module):
        self._modules = span_modules(model)
        self._device = model.device
        self._handles: list[RemovableHandle] = []
        self._thread = threading.local()

    def attach(self) -> None:
        """Starts to time."""
        for module, (name, layer) in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._enter, prepend=True))
            self._handles.append(module.register_forward_hook(self._leaver(name, layer)))

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> list[Span]:
        """The spans of this thread since the last call. What was begun and not ended is dropped."""
        seen = getattr(self._thread, "seen", [])
        self._thread.seen, self._thread.begun = [], []
        return seen

    def _enter(self, module: nn.Module, args: tuple) -> None:
        if hasattr(self._thread, "begun"):
            self._thread.begun.append((module, time.perf_counter_ns(), mark(self._device)))

    def _leaver(self, name: str, layer: int):
        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            begun = getattr(self._thread, "begun", [])
            while begun:
                entered, start_ns, event = begun.pop()
                if entered is module:
                    span = (name, layer, start_ns, time.perf_counter_ns() - start_ns, event, mark(self._device))
                    self._thread.seen.append(span)
                    return

        return leave


def mark(device: torch.device) -> torch.cuda.Event | None:
    """An event that the GPU reaches when it has done what was asked of it so far; None off CUDA."""
    if device.type != "cuda":
        return None
    event = torch.cuda.Event(enable_timing=True)
    event.record(torch.cuda.current_stream(device))
    return event


def elapsed_ns(begun: Any, ended: Any) -> int | None:
    """Nanoseconds a GPU took between two events, waiting for the second; None off the GPU."""
    if begun is None:
        return None
    ended.synchronize()
    return round(begun.elapsed_time(ended) * 1e6)


def span_rows(step: int, spans: list[Span]) -> Iterator[tuple]:
    """Rows of the spans table."""
    for name, layer, start_ns, duration_ns, begun, ended in spans:
        yield step, name, layer, start_ns, duration_ns, elapsed_ns(begun, ended)
