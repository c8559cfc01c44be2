"""A bank whose experts are parts of their own: cut down, merged, zeroed, gone."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

from workbench.engine.experts import apply


class PartsBank:
    """Experts each computed by what stands in its place. FLOPs and bytes are those of the matrices that are there."""

    def __init__(self, parts: Sequence[nn.Module | torch.Tensor | None]):
        """One expert `alone`, or the constant output `[d]` of one that computes nothing; None for one that is gone."""
        self.parts = tuple(parts)
        matrices = [_matrices(part) for part in parts]
        self.flops = [2 * sum(matrix.numel() for matrix in each) for each in matrices]
        self.weight_bytes = [sum(matrix.nbytes for matrix in each) for each in matrices]
        self.token_bytes = [sum(sum(matrix.shape) * matrix.element_size() for matrix in each) for each in matrices]

    def compute(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """One expert's output."""
        part = self.parts[expert]
        if part is None:
            raise LookupError(f"Expert {expert} is gone, and a token was given to it.")
        return part.expand_as(hidden) if isinstance(part, torch.Tensor) else apply(part, hidden)


def _matrices(part: nn.Module | torch.Tensor | None) -> list[torch.Tensor]:
    if not isinstance(part, nn.Module):
        return []
    return [weight[0] for _, weight in part.named_parameters(recurse=False) if weight.ndim == 3]
