"""Expert routing, seen at the module that holds the experts, whatever the model's gate returns.

The module is called with the chosen experts and their weights, so a pre-forward hook sees the routing of any model
whose experts are stacked in one module. The hook keeps the two tensors and nothing else; they are fetched and counted
in bulk later, with no device sync while the model runs. Where the router's logits are wanted, a hook on the router computes
them from what it was given, since what routers return differs.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle

from workbench.errors import UserError
from workbench.models.anatomy import expert_modules, router_modules, unseen_experts
from workbench.probes.unobserved import unobserved

MODES = ("load", "choices", "logits")
"""What is recorded of routing: tokens by expert alone, every token's choices too, or the router's logits as well."""


@dataclass(frozen=True)
class Choice:
    """What one call of a layer's experts was told."""

    layer: int
    num_experts: int
    experts: torch.Tensor
    """`[tokens, k]`; the number of experts where a token was dropped."""
    weights: torch.Tensor
    """`[tokens, k]`."""
    logits: torch.Tensor | None = None
    """`[tokens, E]` float32."""
    positions: torch.Tensor | None = None
    """`[B, Q]` positions of the tokens, -1 for padding, where whoever runs the model knows them."""


def check_mode(mode: str) -> str:
    """The mode itself. Raises UserError for one there is not."""
    if mode not in MODES:
        raise UserError(f"There is no routing mode {mode!r}; the modes are {', '.join(MODES)}.")
    return mode


class _Seen(threading.local):
    """What one thread's calls chose."""

    def __init__(self):
        self.choices: list[Choice] = []
        self.logits: dict[int, torch.Tensor] = {}


class RoutingProbe:
    """Hooks every experts module and keeps the choices of each call until `take`."""

    def __init__(self, model: nn.Module, mode: str = "load", positions: Callable[[int], torch.Tensor] | None = None):
        """Nothing is hooked before `attach`.

        Args:
            model: the model.
            mode: one of `MODES`.
            positions: where so many tokens of the call in progress stand, if the caller knows.
        """
        self.mode = check_mode(mode)
        self._positions = positions if mode != "load" else None
        self._modules = expert_modules(model)
        self._routers = router_modules(model) if mode == "logits" else {}
        self._handles: list[RemovableHandle] = []
        self._here = _Seen()
        self._unseen = unseen_experts(model)
        self._missed = 0
        """Calls of experts whose choice was not among their arguments."""
        self._unscored: set[int] = set()
        """Layers whose router was not called before its experts, or was not found."""

    def attach(self) -> None:
        """Starts to observe."""
        for layer, module in self._modules.items():
            handle = module.register_forward_pre_hook(self._observer(layer), with_kwargs=True)
            self._handles.append(handle)
        for layer, module in self._routers.items():
            self._handles.append(module.register_forward_pre_hook(self._router_observer(layer), with_kwargs=True))

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def take(self) -> list[Choice]:
        """This thread's choices since the last call."""
        seen, self._here.choices = self._here.choices, []
        return seen

    def notes(self) -> list[str]:
        """Sentences on what could not be seen."""
        notes = [
            f"{name} of layers {', '.join(map(str, layers))} is not told which of its experts are chosen, or is a second set "
            "of them; its routing is not in this trace."
            for name, layers in self._unseen.items()
        ]
        if self._missed:
            notes.append(f"{self._missed} calls of experts did not show which were chosen; they are not in this trace.")
        if self._unscored:
            layers = ", ".join(map(str, sorted(self._unscored)))
            notes.append(
                f"The logits of the routers of layers {layers} could not be seen; they are null in the table of choices."
            )
        return notes

    def _observer(self, layer: int) -> Callable[[nn.Module, tuple, dict], None]:
        num_experts, here, positions_of = self._modules[layer].down_proj.shape[0], self._here, self._positions
        scored = self.mode == "logits"

        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            choice = chosen_experts(args, kwargs)
            if choice is None:
                self._missed += 1
                return
            logits = here.logits.pop(layer, None) if scored else None
            if scored and logits is None:
                self._unscored.add(layer)
            positions = None if positions_of is None else positions_of(prod(choice[0].shape[:-1]))
            here.choices.append(Choice(layer, num_experts, *choice, logits, positions))

        return observe

    def _router_observer(self, layer: int) -> Callable[[nn.Module, tuple, dict], None]:
        here = self._here

        def observe(module: nn.Module, args: tuple, kwargs: dict) -> None:
            with unobserved():  # our own product is no part of a layer that is being checked
                here.logits[layer] = router_logits(module, args, kwargs)

        return observe


def router_logits(router: nn.Module, args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """A router's scores of all experts `[tokens, E]` in float32, from what it is called with: what routers return differs."""
    hidden = args[0] if args else next(iter(kwargs.values()))
    weight, bias = router.weight, router._parameters.get("bias")  # to ask a module for what it has not got takes longer
    scores = F.linear(hidden.detach().float(), weight.detach().float(), None if bias is None else bias.detach().float())
    return scores.reshape(-1, len(weight))


def chosen_experts(args: tuple, kwargs: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The chosen experts and their weights `[tokens, k]`, among the arguments of an experts module; None if not there."""
    if len(args) == 3 and args[1].shape == args[2].shape and not args[1].is_floating_point():  # what nearly all are given
        return args[1], args[2].detach()
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
    """Rows of the routing table for several steps, their tensors fetched in one go. Dropped tokens are not counted."""
    choices = [(step, choice) for step, seen in steps for choice in seen]
    if not choices:
        return
    experts = _fetched([choice.experts.reshape(-1) for _, choice in choices])
    weights = _fetched([choice.weights.reshape(-1).float() for _, choice in choices])
    start = 0
    for step, choice in choices:
        stop = start + choice.experts.numel()
        chosen, given, count = experts[start:stop], weights[start:stop], choice.num_experts
        tokens = np.bincount(chosen, minlength=count)[:count]
        sums = np.bincount(chosen, weights=given, minlength=count)[:count]
        for expert, (num_tokens, weight_sum) in enumerate(zip(tokens.tolist(), sums.tolist(), strict=True)):
            yield step, choice.layer, expert, num_tokens, weight_sum
        start = stop


def choice_rows(step: int, choices: list[Choice], starts: list[int]) -> Iterator[tuple]:
    """Rows of the table of choices for one step; `starts` is the position of each row's first token, below 0 for padding."""
    for choice in choices:
        tokens = len(choice.experts.reshape(-1, choice.experts.shape[-1]))
        if choice.positions is None:
            length = tokens // len(starts)
            positions = [start + column for start in starts for column in range(length)]
        else:
            positions = choice.positions.flatten().tolist()
        rows = np.repeat(np.arange(len(starts)), tokens // len(starts)).tolist()
        experts = choice.experts.reshape(tokens, -1).where(choice.experts.reshape(tokens, -1) < choice.num_experts, -1)
        logits = [None] * tokens if choice.logits is None else choice.logits.tolist()
        columns = (rows, positions, experts.tolist(), choice.weights.reshape(tokens, -1).float().tolist(), logits)
        for row, position, *token in zip(*columns, strict=True):
            if position >= 0:
                yield step, choice.layer, row, position, *token


def _fetched(tensors: list[torch.Tensor]) -> np.ndarray:
    """Flat tensors one after the other, fetched once a run of the same device: a model may be split over several."""
    runs = [list(run) for _, run in itertools.groupby(tensors, key=lambda tensor: tensor.device)]
    return torch.cat([torch.cat(run).cpu() for run in runs]).numpy()
