"""Expert routing, seen at the module that holds the experts, whatever the model's gate returns.

The module is called with the chosen experts and their weights, so a pre-forward hook sees the routing of any model
whose experts are stacked in one module. Counts stay on the device until they are asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from workbench.models.anatomy import expert_modules

Counts = tuple[int, torch.Tensor, torch.Tensor]
"""Layer, tokens by expert `[E]`, and sum of routing weights by expert `[E]`."""


class RoutingProbe:
    """Hooks every experts module and keeps the counts of each call until `take`."""

    def __init__(self, model: nn.Module):
        self._modules = expert_modules(model)
        self._handles: list[RemovableHandle] = []
        self._seen: list[Counts] = []

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

    def take(self) -> list[Counts]:
        """The counts since the last call."""
        seen, self._seen = self._seen, []
        return seen

    def _observer(self, layer: int) -> Callable[[nn.Module, tuple, dict], None]:
        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            index, weights = chosen_experts(args, kwargs)
            self._seen.append((layer, *count(index, weights, module.down_proj.shape[0])))

        return observe


def chosen_experts(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor]:
    """The integer tensor of chosen experts and their weights `[tokens, k]`, among the arguments of an experts module."""
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
    index = next(tensor for tensor in tensors if not tensor.is_floating_point())
    weights = tensors[-1] if tensors[-1] is not index else tensors[-2]
    if weights.shape != index.shape:
        weights = weights.gather(-1, index)
    return index, weights


def count(index: torch.Tensor, weights: torch.Tensor, num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and weight sums by expert, with no device sync. An index of `num_experts` means: dropped."""
    flat = index.reshape(-1).long()
    tokens = torch.zeros(num_experts + 1, dtype=torch.int64, device=index.device)
    tokens.scatter_add_(0, flat, torch.ones_like(flat))
    sums = torch.zeros(num_experts + 1, dtype=torch.float32, device=index.device)
    sums.scatter_add_(0, flat, weights.reshape(-1).float())
    return tokens[:-1], sums[:-1]


def routing_rows(step: int, seen: list[Counts]):
    """Rows of the routing table for what was seen in a step."""
    for layer, tokens, sums in seen:
        for expert, (num_tokens, weight_sum) in enumerate(zip(tokens.tolist(), sums.tolist(), strict=True)):
            yield step, layer, expert, num_tokens, weight_sum
