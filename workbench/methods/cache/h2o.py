"""H2O, the heavy-hitter oracle: the most attended tokens and the most recent ones. Zhang et al. 2023, arXiv 2306.14048."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import MASS, LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import EVERY_STEP, CacheMethod, keep_top, recent


@register
@dataclass(frozen=True)
class H2O(CacheMethod):
    """Keeps the tokens that have received the most attention so far, and the most recent ones, at every step."""

    name: ClassVar[str] = "h2o"
    paper: ClassVar[str] = "Zhang et al. 2023, arXiv 2306.14048"
    needs: ClassVar[frozenset[str]] = frozenset({MASS})
    acts: ClassVar[frozenset[str]] = EVERY_STEP
    rowwise: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "Attention is summed over the query heads of a group, since the paper's code knows only one query head a kv head.",
        "Scores are kept by batch row; the paper's code sums them over the batch.",
        "By default positions are the true ones, as in the paper's plain variant; its streaming variant rotates by cache slot, "
        "as positions=slot does (exactly, where a model's frequencies do not change with the length).",
    )

    budget: Budget = budget_knob(0.2)
    recent: float = knob(0.5, low=0.0, high=1.0, unit="share of budget", help="Share of the budget held by recent tokens.")
    positions: str = knob("true", choices=("true", "slot"), help="Whether tokens stand at their own positions or close ranks.")

    @property
    def by_slot(self) -> bool:
        """Whether tokens that stay close ranks."""
        return self.positions == "slot"

    def keep(self, state: LayerState) -> torch.Tensor:
        """The recent tokens, and among the others those of the highest accumulated attention."""
        num_recent = (state.capacity * self.recent).long()
        is_recent = recent(state, num_recent)
        return keep_top(state.mass.masked_fill(is_recent, torch.inf), state.capacity, state.occupied)
