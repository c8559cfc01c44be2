"""Expert routing, seen at the module that holds the experts, whatever the model's gate returns.

The module is called with the chosen experts and their weights, so a pre-forward hook sees the routing of any model
whose experts are stacked in one module. The hook keeps the two tensors and nothing else; they are fetched and counted
in bulk later, with no device sync while the model runs.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from workbench.models.anatomy import expert_modules

Choice = tuple[int, int, torch.Tensor, torch.Tensor]
"""Layer, number of experts, chosen experts `[tokens, k]` and their weights `[tokens, k]`."""


class _Seen(threading.local):
    """What one thread's calls chose."""

    def __init__(self):
        self.choices: list[Choice] = []


class RoutingProbe:
    """Hooks every experts module and keeps the choices of each call until `take`."""

    def __init__(self, model: nn.Module):
        self._modules = expert_modules(model)
        self._handles: list[RemovableHandle] = []
        self._here = _Seen()
        self.missed = 0
        """Calls of experts whose choice was not among their arguments."""

    def attach(self) -> None:
        """Starts to observe."""
        for layer, module in self._modules.items():
            handle = module.register_forward_pre_hook(self._observer(layer), with_kwargs=True)
            self._handles.append(handle)

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> list[Choice]:
        """This thread's choices since the last call."""
        seen, self._here.choices = self._here.choices, []
        return seen

    def _observer(self, layer: int) -> Callable[[nn.Module, tuple, dict], None]:
        num_experts = self._modules[layer].down_proj.shape[0]

        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            choice = chosen_experts(args, kwargs)
            if choice is None:
                self.missed += 1
            else:
                self._here.choices.append((layer, num_experts, *choice))

        return observe


def chosen_experts(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The chosen experts and their weights `[tokens, k]`, among the arguments of an experts module; None if not there."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    index = next((tensor for tensor in tensors if not tensor.is_floating_point()), None)
    if index is None or len(tensors) < 2:
        return None
    weights = (tensors[-1] if tensors[-1] is not index else tensors[-2]).detach()
    if weights.shape[:-1] != index.shape[:-1]:
        return None
    if weights.shape != index.shape:
        weights = weights.gather(-1, index)
    return index, weights


def routing_rows(steps: list[tuple[int, list[Choice]]]) -> Iterator[tuple]:
    """Rows of the routing table for several steps, their tensors fetched in one go.

    A chosen expert equal to the number of experts means that the token was dropped there; it is not counted.
    """
    choices = [(step, *choice) for step, seen in steps for choice in seen]
    if not choices:
        return
    experts = _fetched([index.reshape(-1) for *_, index, _ in choices])
    weights = _fetched([weight.reshape(-1).float() for *_, weight in choices])
    start = 0
    for step, layer, num_experts, index, _ in choices:
        stop = start + index.numel()
        chosen, given = experts[start:stop], weights[start:stop]
        tokens = np.bincount(chosen, minlength=num_experts)[:num_experts]
        sums = np.bincount(chosen, weights=given, minlength=num_experts)[:num_experts]
        for expert, (num_tokens, weight_sum) in enumerate(zip(tokens.tolist(), sums.tolist(), strict=True)):
            yield step, layer, expert, num_tokens, weight_sum
        start = stop


def _fetched(tensors: list[torch.Tensor]) -> np.ndarray:
    """Flat tensors one after the other, fetched once a run of the same device: a model may be split over several."""
    runs = [list(run) for _, run in itertools.groupby(tensors, key=lambda tensor: tensor.device)]
    return torch.cat([torch.cat(run).cpu() for run in runs]).numpy()
