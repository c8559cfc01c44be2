"""The inner neurons of experts, whatever way a family stores them: what one holds, which to keep, what goes through them.

An expert is `down(act(gate(x)) * up(x))`, or `down(act(up(x)))`. Inner neuron k is entry k of what goes into `down`, and owns a
slice of every weight with an axis of inner size f, or of gate and up side by side (2f: one after the other, or in turns).
Which axis that is follows from shapes, and from trying where they leave a choice.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import nn

from workbench.engine.experts import alone, apply
from workbench.errors import UserError

_TRIED = 7
"""Tokens on which a layout is tried."""


@dataclass(frozen=True)
class Neurons:
    """Where a module of stacked experts holds its inner neurons. Shapes: E experts, f neurons each, d hidden."""

    module: nn.Module
    count: int
    """f."""
    axes: Mapping[str, int]
    """The axis of neurons in each weight that has one, counted with that of experts."""
    interleaved: bool
    """Whether gate and up of a neuron lie side by side where both are in one weight."""

    def keep(self, expert: int, kept: torch.Tensor) -> dict[str, torch.Tensor]:
        """The weights `[1, ...]` of one expert with these neurons alone, in memory of their own."""
        return {
            name: getattr(self.module, name)[expert : expert + 1].index_select(axis, self._places(name, kept))
            for name, axis in self.axes.items()
        }

    def constant(self, expert: int) -> torch.Tensor:
        """`[d]` what an expert gives without any of its neurons: its output bias, if it has one."""
        down = self.module.down_proj[expert : expert + 1]
        hidden = down.new_zeros(1, down.shape[3 - self.axes["down_proj"]])
        return apply(alone(self.module, expert, down_proj=torch.zeros_like(down)), hidden)[0]

    def columns(self, expert: int) -> torch.Tensor:
        """`[d, f]` what each neuron adds to the output: column k of `down`."""
        weight = self.module.down_proj[expert]
        return weight if self.axes["down_proj"] == 2 else weight.T

    def inner(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """`[n, f]` what goes into `down` for n tokens `[n, d]`: read off an expert whose `down` picks d neurons at a time."""
        down, size = self.module.down_proj, hidden.shape[-1]
        without = {name: torch.zeros_like(weight[:1]) for name, weight in _weights(self.module) if name not in self.axes}
        parts = []
        for start in range(0, self.count, size):
            picks = torch.eye(size, self.count, dtype=down.dtype, device=down.device).roll(start, 1)
            picks[max(0, self.count - start) :] = 0
            down_proj = picks if self.axes["down_proj"] == 2 else picks.T.contiguous()
            parts.append(apply(alone(self.module, expert, **{**without, "down_proj": down_proj[None]}), hidden))
        return torch.cat(parts, -1)[:, : self.count]

    def _places(self, name: str, kept: torch.Tensor) -> torch.Tensor:
        """Where the slices of neurons lie on a weight's axis of neurons."""
        copies = getattr(self.module, name).shape[self.axes[name]] // self.count
        many = torch.arange(copies, device=kept.device)
        return (kept[:, None] * copies + many).flatten() if self.interleaved else (kept + self.count * many[:, None]).flatten()


def neurons(module: nn.Module) -> Neurons:
    """Finds a layout: without a neuron nothing else changes, and all neurons together are what the expert computes.

    Raises UserError if there is none.
    """
    generator = torch.Generator().manual_seed(0)
    drawn = {name: _drawn(weight, generator) for name, weight in _weights(module)}
    trial = alone(module, 0, **drawn)
    for layout in _layouts(trial):
        if _fits(trial, layout, generator):
            return Neurons(module, layout.count, layout.axes, layout.interleaved)
    shapes = ", ".join(f"{name} {tuple(weight.shape)}" for name, weight in _weights(module))
    raise UserError(
        f"The inner neurons of {type(module).__name__} ({shapes}) could not be told apart: its experts are not a product, an "
        "activation and a product; choose a method that leaves experts whole."
    )


def _weights(module: nn.Module) -> list[tuple[str, torch.Tensor]]:
    return [(name, weight) for name, weight in module.named_parameters(recurse=False) if weight.ndim > 1]


def _drawn(weight: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random weights `[1, ...]`: a bias that is zero would not tell where its neurons lie."""
    drawn = torch.randn(1, *weight.shape[1:], generator=generator) / weight.shape[-1] ** 0.5
    return drawn.to(weight.device, weight.dtype)


def _layouts(trial: nn.Module) -> Iterator[Neurons]:
    weights = dict(_weights(trial))
    down = weights.pop("down_proj")
    for inner, outer in ((2, 1), (1, 2)):
        count, hidden = down.shape[inner], down.shape[outer]
        choices = [_axes(weight, count, hidden) for weight in weights.values()]
        for chosen, interleaved in itertools.product(itertools.product(*choices), (False, True)):
            axes = {name: axis for name, axis in zip(weights, chosen, strict=True) if axis is not None}
            if any(weights[name].ndim == 3 for name in axes):
                yield Neurons(trial, count, {**axes, "down_proj": inner}, interleaved)


def _axes(weight: torch.Tensor, count: int, hidden: int) -> list[int | None]:
    """The axes of a weight that may be that of neurons; None where it may have none: a bias of the output."""
    axes: list[int | None] = [axis for axis in range(1, weight.ndim) if weight.shape[axis] in (count, 2 * count)]
    return axes + [None] * (weight.ndim == 2 and weight.shape[1] == hidden)


def _fits(trial: nn.Module, layout: Neurons, generator: torch.Generator) -> bool:
    down, inner = trial.down_proj, layout.axes["down_proj"]
    hidden = torch.randn(_TRIED, down.shape[3 - inner], generator=generator).to(down.device, down.dtype)
    some = torch.rand(layout.count, generator=generator).to(down.device) < 0.5
    some[0], some[-1] = True, False
    shape = [1, layout.count, 1] if inner == 1 else [1, 1, layout.count]
    near = {torch.float32: 1e-4, torch.float64: 1e-8}.get(down.dtype, 5e-2)
    try:
        whole, none = (apply(alone(trial, 0, down_proj=weight), hidden) for weight in (down, torch.zeros_like(down)))
        halves = [apply(alone(trial, 0, down_proj=down * mask.view(shape)), hidden) for mask in (some, ~some)]
        cut = [apply(alone(trial, 0, **layout.keep(0, mask.nonzero().flatten())), hidden) for mask in (some, ~some)]
    except (RuntimeError, IndexError):
        return False
    pairs = [*zip(halves, cut, strict=True), (whole + none, halves[0] + halves[1])]
    return all(torch.allclose(one.float(), other.float(), rtol=near, atol=near) for one, other in pairs)
