"""KNorm: keys of small norm draw attention. Devoto et al. 2024, arXiv 2406.11430."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top, recent


@register
@dataclass(frozen=True)
class KNorm(CacheMethod):
    """Keeps, once the prompt is read, the tokens whose keys have the smallest norm; it needs no query."""

    name: ClassVar[str] = "knorm"
    paper: ClassVar[str] = "Devoto et al. 2024, arXiv 2406.11430"
    deviations: ClassVar[tuple[str, ...]] = (
        "Every layer is held to the budget, as in kvpress; the paper leaves the first two layers whole, which costs more "
        "than the budget.",
    )

    budget: Budget = budget_knob(0.2)
    keep_recent: int = knob(
        0, low=0, high=1024, unit="tokens", help="Last tokens that always stay; they come out of the budget."
    )

    def keep(self, state: LayerState) -> torch.Tensor:
        """The tokens of smallest key norm. Rotation does not change a norm, so position plays no part."""
        scores = -torch.linalg.vector_norm(state.keys, dim=-1, dtype=torch.float32)
        is_recent = recent(state, state.capacity.clamp(max=self.keep_recent))
        return keep_top(scores.masked_fill(is_recent, torch.inf), state.capacity, state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """No matrix product; keys read, scores written."""
        return 0, state.keys.nbytes + 4 * state.positions.numel()
