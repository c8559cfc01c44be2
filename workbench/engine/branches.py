"""A dense layer's FFN with branches: every token takes one of several computations, and only what is taken is computed.

Branch 0 is the model's own FFN. Shapes: B rows of Q tokens, T = B Q, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from workbench.engine.call import Call, Number
from workbench.engine.replacing import Forward
from workbench.models.anatomy import mlp_modules
from workbench.trace.anatomy import Anatomy, Linear

if TYPE_CHECKING:
    from workbench.models.load import LM


@dataclass(frozen=True)
class BranchState:
    """The tokens of one layer at the moment they choose."""

    hidden: torch.Tensor
    """`[T, d]` what goes into the FFN, normed."""
    positions: torch.Tensor
    """`[B, Q]` position of each token in its row, -1 for padding."""
    phase: str
    layer: int
    number: int
    """Which of the layers with a dense FFN it is."""
    own: Callable[[torch.Tensor], torch.Tensor]
    """The model's own FFN, `[n, d]` in and out; for methods that look at what they might leave out."""


class Branch(Protocol):
    """A computation that may stand in for an FFN."""

    flops: int
    """Of one token."""
    weight_bytes: int
    """Read if any token takes it."""
    token_bytes: int
    """Activations one token moves."""

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Its output `[n, d]` for n tokens `[n, d]`."""
        ...


class Skip:
    """The branch that computes nothing: what goes on is the residual alone."""

    flops = weight_bytes = token_bytes = 0

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Zeros."""
        return torch.zeros_like(hidden)


@dataclass(frozen=True)
class Cost:
    """What one branch costs."""

    flops: int
    weight_bytes: int
    token_bytes: int
    bias_bytes: int = 0

    @classmethod
    def of(cls, linears: Sequence[Linear], element_bytes: int) -> Cost:
        """Of the model's own matrix products."""
        sizes = [(linear.in_features, linear.out_features) for linear in linears]
        weights = element_bytes * sum(rows * columns for rows, columns in sizes)
        bias = element_bytes * sum(linear.out_features for linear in linears if linear.bias)
        return cls(2 * weights // element_bytes, weights, element_bytes * sum(map(sum, sizes)), bias)


Choose = Callable[[BranchState], torch.Tensor | None]
"""Which branch each token takes, `[T]`; None: all take the model's own."""


def linears_of(anatomy: Anatomy, layer: int, component: str) -> list[Linear]:
    """A layer's matrix products of one component."""
    return [linear for linear in anatomy.layers[layer].linears if linear.component == component]


def branch_forwards(
    lm: LM, call: Call, choose: Choose, branches: Mapping[int, Sequence[Branch]]
) -> Mapping[nn.Module, Forward]:
    """Forwards of the FFNs of the layers that `branches` lists; those listed stand for the numbers from 1 on."""
    modules = mlp_modules(lm.model)
    return {
        modules[layer]: _Layer(lm.anatomy, call, layer, number, choose, parts).forward
        for number, (layer, parts) in enumerate(branches.items())
    }


class _Layer:
    """One FFN under a method."""

    def __init__(self, anatomy: Anatomy, call: Call, layer: int, number: int, choose: Choose, branches: Sequence[Branch]):
        self._call, self._layer, self._number = call, layer, number
        self._choose, self._branches = choose, branches
        self._own = Cost.of(linears_of(anatomy, layer, "mlp"), anatomy.element_bytes)

    def forward(self, original: Callable[..., torch.Tensor], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        def own(tokens: torch.Tensor) -> torch.Tensor:
            return original(tokens[None], *args, **kwargs)[0]

        call, flat = self._call, hidden.flatten(0, -2)
        state = BranchState(flat, call.positions_of(len(flat)), call.phase, self._layer, self._number, own)
        choice = self._choose(state)
        if choice is None:
            call.work(self._layer, "mlp", changed=0)
            return original(hidden, *args, **kwargs)
        taken = choice.bincount(minlength=1 + len(self._branches))
        counts = taken.tolist()
        call.routed(self._layer, len(counts), choice[:, None], torch.ones_like(choice, dtype=torch.float32)[:, None])
        if counts[0] == len(flat):
            call.work(self._layer, "mlp", changed=0)
            return original(hidden, *args, **kwargs)
        call.work(self._layer, "mlp", changed=len(flat) - counts[0], **costs([self._own, *self._branches], counts))
        return scattered([own, *self._branches], choice, counts, flat).view(hidden.shape)


def scattered(
    computations: Sequence[Callable[[torch.Tensor], torch.Tensor]],
    choice: torch.Tensor,
    counts: Sequence[int],
    hidden: torch.Tensor,
) -> torch.Tensor:
    """`[T, d]`: of every token what the computation it chose makes of it. `counts` says how many chose each."""
    for compute, count in zip(computations, counts, strict=True):
        if count == len(hidden):
            return compute(hidden)
    out = torch.zeros_like(hidden)
    for number, (compute, count) in enumerate(zip(computations, counts, strict=True)):
        if count:
            tokens = (choice == number).nonzero()[:, 0]
            out.index_copy_(0, tokens, compute(hidden[tokens]).to(out.dtype))
    return out


def costs(branches: Sequence[Branch | Cost], counts: Sequence[int]) -> dict[str, Number]:
    """FLOPs, fused bytes and weight bytes of so many tokens in each branch."""
    taken = [(branch, count) for branch, count in zip(branches, counts, strict=True) if count]
    weights = sum(branch.weight_bytes for branch, _ in taken)
    biases = sum(getattr(branch, "bias_bytes", 0) for branch, _ in taken)
    activations = sum(count * branch.token_bytes for branch, count in taken)
    return {
        "flops": sum(count * branch.flops for branch, count in taken),
        "bytes": weights + biases + activations,
        "weight_bytes": weights,
    }
