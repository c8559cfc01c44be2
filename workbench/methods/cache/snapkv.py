"""SnapKV: what the end of the prompt looks at. Li et al. 2024, arXiv 2404.14469."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import QUERIES, LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top, observing_cost, window_scores


@register
@dataclass(frozen=True)
class SnapKV(CacheMethod):
    """Keeps, once the prompt is read, the tokens its last queries attend to most, with their neighbours."""

    name: ClassVar[str] = "snapkv"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2404.14469"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES})
    deviations: ClassVar[tuple[str, ...]] = (
        "Query heads of a group share one kept set (mean after pooling), so no kv head is stored more than once; "
        "the paper's code repeats K and V for every query head first.",
        "The window is at most half the budget, so that small budgets still choose; the paper's code needs budget > window.",
    )

    budget: Budget = budget_knob(0.2)
    window: int = knob(32, low=1, high=1024, unit="tokens", help="Last queries that vote; their own tokens always stay.")
    kernel: int = knob(
        5, unit="tokens", help="Width of the pooling that lifts a token's neighbours; odd.", choices=(1, 3, 5, 7, 9, 11, 13)
    )
    pooling: str = knob("avg", choices=("avg", "max"), help="How scores are pooled.")

    def keep(self, state: LayerState) -> torch.Tensor:
        """The window, and the best-scored tokens before it. Scores: attention summed over the window's queries."""
        scores = window_scores(state, self._windows(state), self.pooling, self.kernel)
        return keep_top(scores, state.capacity, state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """One pass of the window's queries over the keys: `2 Hq W N D` FLOPs; keys read, scores written."""
        return observing_cost(state, int(self._windows(state).max()))

    def _windows(self, state: LayerState) -> torch.Tensor:
        """`[B]` last tokens that stay in each row; those of this call vote with their queries."""
        return torch.minimum(state.capacity // 2, state.newest.view(-1) + 1).clamp(1, self.window)
