"""A dense layer's FFN as matrices, whatever the family calls them: `down(act(gate x) * up x)`, or `down(act(up x))`.

Which matrix is which is found by trying: the reading that gives the module's own output back.
Shapes: T tokens, d hidden, f neurons, n neurons chosen.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import nn

from workbench.engine.check import tolerance
from workbench.errors import UserError
from workbench.models.anatomy import mlp_linears, mlp_modules
from workbench.probes.unobserved import unobserved

if TYPE_CHECKING:
    from workbench.models.load import LM

_TRIED_TOKENS = 4

Matrix = tuple[torch.Tensor, torch.Tensor | None]
"""Weight `[out, in]` and bias."""


@dataclass(frozen=True)
class Ffn:
    """One FFN. A matrix is `[out, in]` with a bias or None; without a gate, `up` is what the activation takes."""

    act: Callable[[torch.Tensor], torch.Tensor]
    up: Matrix
    down: Matrix
    gate: Matrix | None = None

    @property
    def neurons(self) -> int:
        """How many."""
        return self.up[0].shape[0]

    @property
    def matrices(self) -> list[torch.Tensor]:
        """The weights."""
        return [matrix[0] for matrix in (self.gate, self.up, self.down) if matrix is not None]

    @property
    def flops(self) -> int:
        """Of one token: 2 for each weight."""
        return 2 * sum(weight.numel() for weight in self.matrices)

    @property
    def weight_bytes(self) -> int:
        """Of the weight matrices."""
        return sum(weight.numel() * weight.element_size() for weight in self.matrices)

    @property
    def token_bytes(self) -> int:
        """Activations that one token moves: in and out of every matrix."""
        return sum(sum(weight.shape) * weight.element_size() for weight in self.matrices)

    def activated(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the activation gives, `[T, f]`: before the product with `up x`, if there is a gate."""
        return self.act(F.linear(hidden, *(self.gate or self.up)))

    def inner(self, hidden: torch.Tensor) -> torch.Tensor:
        """What goes into `down`, `[T, f]`."""
        activated = self.activated(hidden)
        return activated if self.gate is None else activated * F.linear(hidden, *self.up)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """The output `[T, d]`."""
        return F.linear(self.inner(hidden), *self.down)

    def only(self, neurons: torch.Tensor) -> Ffn:
        """The same with some of its neurons `[n]`, in matrices of their own."""
        rows = [None if each is None else _rows(each, neurons) for each in (self.gate, self.up)]
        return replace(self, gate=rows[0], up=rows[1], down=(self.down[0][:, neurons], self.down[1]))


def _rows(matrix: Matrix, neurons: torch.Tensor) -> Matrix:
    weight, bias = matrix
    return weight[neurons], None if bias is None else bias[neurons]


def ffns(lm: LM) -> Mapping[int, Ffn]:
    """The FFN of every dense layer, by index, on the model's own weights.

    Raises UserError if there is none, or for one that is of another form.
    """
    linears = mlp_linears(lm.model)
    if not linears:
        raise UserError(
            f"{lm.name} has no dense FFN in a module of its own that is called with hidden states alone; choose a dense model "
            "such as tiny-dense, or another method."
        )
    found = {}
    for layer, module in mlp_modules(lm.model).items():
        found[layer] = _read(module, linears[layer], lm.anatomy.hidden_size, tolerance(lm.model))
        if found[layer] is None:
            raise UserError(
                f"The FFN of layer {layer} of {lm.name} is not of the form down(act(gate x) * up x) or down(act(up x)); "
                "choose another method."
            )
    return found


def down_modules(lm: LM) -> dict[int, nn.Module]:
    """The last matrix product of the FFN of every dense layer."""
    return {layer: modules[-1] for layer, modules in mlp_linears(lm.model).items()}


@torch.no_grad()
def _read(module: nn.Module, linears: list[nn.Module], hidden_size: int, allowed: float) -> Ffn | None:
    *inputs, last = map(_matrix, linears)
    if last[0].shape[0] != hidden_size or any(weight.shape[1] != hidden_size for weight, _ in inputs):
        return None
    hidden = torch.linspace(-1, 1, _TRIED_TOKENS * last[0].shape[0], device=last[0].device, dtype=last[0].dtype)
    hidden = hidden.sin().view(_TRIED_TOKENS, -1)
    with unobserved():
        expected = type(module).forward(module, hidden[None])
    if not isinstance(expected, torch.Tensor):
        return None
    acts = [part for part in module.children() if not any(True for _ in part.parameters())]
    for ffn in _readings(inputs, last, acts):
        gap = (ffn(hidden) - expected[0]).abs().max()
        if gap <= allowed * expected.abs().max():
            return ffn
    return None


def _readings(inputs: list[Matrix], down: Matrix, acts: list[nn.Module]) -> Iterator[Ffn]:
    width = down[0].shape[1]
    parts = [half for matrix in inputs for half in _halves(matrix, width)]
    orders = [(None, parts[0])] if len(parts) == 1 else list(itertools.permutations(parts)) if len(parts) == 2 else []
    for act, (gate, up) in itertools.product(acts, orders):
        if up[0].shape[0] == width:
            yield Ffn(act, up, down, gate)


def _halves(matrix: Matrix, width: int) -> list[Matrix]:
    weight, bias = matrix
    if weight.shape[0] != 2 * width:
        return [matrix]
    return [(half, None if bias is None else bias.chunk(2)[number]) for number, half in enumerate(weight.chunk(2))]


def _matrix(module: nn.Module) -> Matrix:
    weight = module.weight if isinstance(module, nn.Linear) else module.weight.t()
    bias = getattr(module, "bias", None)
    return weight.detach(), None if bias is None else bias.detach()
