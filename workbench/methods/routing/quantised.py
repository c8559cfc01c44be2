"""Expert weights in few bits: rounded to a grid, as signs, or nested, so that fewer bits are the first planes of more.

Codes are really packed, one bit plane after the other, eight weights a byte; scales and zero points are half precision. Groups
of weights that share them lie along a matrix's input dimension, which is the last here.

Shapes: a matrix is `[R, C]`; G groups a row, the last one shorter if the size does not divide C.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import nn

from workbench.engine.experts import OwnBank, alone, apply
from workbench.models.anatomy import expert_modules
from workbench.trace.anatomy import Anatomy, Experts

_SMALLEST = 2.0**-24
"""The smallest half-precision number above 0."""


class Packed(Protocol):
    """A matrix in few bits."""

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        ...

    def dense(self) -> torch.Tensor:
        """`[R, C]` float32."""
        ...


@dataclass(frozen=True)
class Rounded:
    """Asymmetric round-to-nearest: `(code - zero) scale`, where 0 is always on the grid."""

    planes: torch.Tensor
    """`[bits, R, bytes]` uint8, lowest bit first."""
    scale: torch.Tensor
    """`[R, G]` float16."""
    zero: torch.Tensor
    """`[R, G]` float16."""
    columns: int
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.planes.nbytes + self.scale.nbytes + self.zero.nbytes

    def codes(self) -> torch.Tensor:
        """`[R, C]` float32 whole numbers."""
        bits = unpacked(self.planes, self.columns).float()
        return sum((plane * 2**power for power, plane in enumerate(bits)), torch.zeros_like(bits[0]))

    def dense(self) -> torch.Tensor:
        """The matrix."""
        scale, zero = (_spread(each, self.group, self.columns) for each in (self.scale, self.zero))
        return (self.codes() - zero) * scale


@dataclass(frozen=True)
class Signs:
    """One bit: every weight of a group is plus or minus their mean magnitude, which is the nearest to all of them."""

    plane: torch.Tensor
    """`[R, bytes]` uint8, 1 for plus."""
    scale: torch.Tensor
    """`[R, G]` float16."""
    columns: int
    group: int

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.plane.nbytes + self.scale.nbytes

    def dense(self) -> torch.Tensor:
        """The matrix."""
        return (2.0 * unpacked(self.plane, self.columns) - 1) * _spread(self.scale, self.group, self.columns)


def rounded(matrix: torch.Tensor, bits: int, group: int) -> Rounded:
    """A matrix on the grid of each group's range."""
    weights, columns = matrix.float(), matrix.shape[1]
    grouped = _grouped(weights, group)
    least, most = grouped.amin(-1).clamp(max=0), grouped.amax(-1).clamp(min=0)
    scale = ((most - least) / (2**bits - 1)).clamp(min=_SMALLEST).half()
    zero = (-least / scale.float()).round().clamp(0, 2**bits - 1).half()
    codes = (
        (weights / _spread(scale, group, columns) + _spread(zero, group, columns)).round().clamp(0, 2**bits - 1).to(torch.uint8)
    )
    return Rounded(packed(torch.stack([(codes >> power) & 1 for power in range(bits)])), scale, zero, columns, group)


def signs(matrix: torch.Tensor, group: int) -> Signs:
    """The signs of a matrix, and each group's mean magnitude."""
    columns = matrix.shape[1]
    grouped = _grouped(matrix.float().abs(), group)
    counts = _grouped(torch.ones_like(matrix[:1], dtype=torch.float32), group).sum(-1)
    return Signs(packed(matrix >= 0), (grouped.sum(-1) / counts).half(), columns, group)


def nested(matrix: torch.Tensor, base_bits: int, levels: int, group: int) -> tuple[Packed, ...]:
    """A base and sign planes of what it and the planes before leave over: the sum of the first k is the matrix at level k.

    A plane's scale is the mean magnitude of the rest, which leaves the least square error (D2MoE, arXiv 2504.15299).
    """
    parts: list[Packed] = [rounded(matrix, base_bits, group)]
    for _ in range(levels - 1):
        parts.append(signs(matrix.float() - sum(part.dense() for part in parts), group))
    return tuple(parts)


def packed(bits: torch.Tensor) -> torch.Tensor:
    """`[..., n]` of 0 and 1 as `[..., ceil(n / 8)]` bytes, the first of eight in the lowest bit."""
    eights = F.pad(bits.to(torch.uint8), (0, -bits.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (eights << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(-1, dtype=torch.uint8)


def unpacked(planes: torch.Tensor, count: int) -> torch.Tensor:
    """The first `count` bits `[..., count]` of each row of bytes."""
    bits = (planes[..., None] >> torch.arange(8, dtype=torch.uint8, device=planes.device)) & 1
    return bits.flatten(-2)[..., :count]


def _grouped(matrix: torch.Tensor, group: int) -> torch.Tensor:
    """`[R, G, group]`, filled up with zeros."""
    return F.pad(matrix, (0, -matrix.shape[1] % group)).unflatten(-1, (-1, group))


def _spread(by_group: torch.Tensor, group: int, columns: int) -> torch.Tensor:
    """`[R, C]` float32: each column its group's."""
    return by_group.float().repeat_interleave(group, 1)[:, :columns]


def matrices(module: nn.Module) -> dict[str, torch.Tensor]:
    """The stacked weight matrices of an experts module `[E, ., .]` by name; biases are none of them."""
    return {name: weight for name, weight in module.named_parameters(recurse=False) if weight.ndim == 3}


def input_is_last(module: nn.Module, hidden_size: int) -> bool:
    """Whether the module's matrices are `[E, out, in]`, as most families have them, and not `[E, in, out]`."""
    for name, weight in matrices(module).items():
        _, rows, columns = weight.shape
        if (rows == hidden_size) != (columns == hidden_size):
            return (rows if name == "down_proj" else columns) == hidden_size
    return not getattr(module, "is_transposed", False)


class PackedExpert:
    """One expert in few bits: each of its matrices as a sum of parts, which are dequantised when it is computed."""

    def __init__(self, module: nn.Module, expert: int, hidden_size: int, quantise: Callable[[torch.Tensor], Sequence[Packed]]):
        self._module, self._expert, self._turned = module, expert, not input_is_last(module, hidden_size)
        self.parts = {name: tuple(quantise(self._turn(stack[expert].detach()))) for name, stack in matrices(module).items()}

    def nbytes(self, level: int | None = None) -> int:
        """Bytes of the first `level` parts of each matrix; of all by default."""
        return sum(part.nbytes for parts in self.parts.values() for part in parts[:level])

    def compute(self, hidden: torch.Tensor, level: int | None = None) -> torch.Tensor:
        """The expert's output `[n, d]`, with the first `level` parts of each matrix."""
        weights = {name: self._turn(self._sum(parts[:level])).to(hidden.dtype)[None] for name, parts in self.parts.items()}
        return apply(alone(self._module, self._expert, **weights), hidden)

    def _sum(self, parts: Sequence[Packed]) -> torch.Tensor:
        first, *others = (part.dense() for part in parts)
        return sum(others, first)

    def _turn(self, matrix: torch.Tensor) -> torch.Tensor:
        return matrix.transpose(0, 1) if self._turned else matrix


class PackedBank:
    """A layer's experts in few bits."""

    def __init__(self, module: nn.Module, experts: Experts, element_bytes: int, packed_experts: Sequence[PackedExpert]):
        own = OwnBank(module, experts, element_bytes)
        self.experts = packed_experts
        self.flops, self.token_bytes = own.flops, own.token_bytes
        self.weight_bytes = [expert.nbytes() for expert in packed_experts]

    def compute(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """One expert's output."""
        return self.experts[expert].compute(hidden)


def experts_of(model: nn.Module, anatomy: Anatomy) -> Iterator[tuple[int, nn.Module, Experts]]:
    """Layer, experts module and its anatomy, of every layer that has one."""
    for layer, module in expert_modules(model).items():
        yield layer, module, anatomy.layers[layer].experts
