"""AdaKV: heads whose attention is spread keep more than heads that look at little. Feng et al. 2024, arXiv 2407.11550."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import QUERIES, LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top, observing_cost, recent, window_scores
from workbench.methods.cache.budgets import adaptive, adaptive_each


@register
@dataclass(frozen=True)
class AdaKV(CacheMethod):
    """Keeps what SnapKV would, but a kv head gets the more room the more of the layer's best-scored tokens are its own."""

    name: ClassVar[str] = "adakv"
    paper: ClassVar[str] = "Feng et al. 2024, arXiv 2407.11550"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES})
    ragged: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "The heads' budgets sum to exactly the layer's: largest remainders are rounded up. The paper's code rounds each by "
        "itself, rounding='each' here, and may lose or gain a few tokens; what it gains is taken back, so that no budget is "
        "exceeded, and for what it loses the budget still counts as promised.",
        "Query heads of a group share one kept set (mean after pooling), as in SnapKV here; the paper's code for groups "
        "reduces before it pools.",
        "The window is at most half the budget, so that small budgets still choose; the paper's code needs budget > window.",
        "Equal scores go to the earlier token, whatever its head, so that equal heads get equal budgets.",
    )

    budget: Budget = budget_knob(0.2)
    window: int = knob(32, low=1, high=1024, unit="tokens", help="Last queries that vote; their own tokens always stay.")
    kernel: int = knob(
        7, unit="tokens", help="Width of the pooling that lifts a token's neighbours; odd.", choices=(1, 3, 5, 7, 9, 11, 13)
    )
    pooling: str = knob("max", choices=("avg", "max"), help="How scores are pooled.")
    floor: float = knob(0.2, low=0.0, high=1.0, help="Share of the budget divided evenly over the heads; at 1 this is SnapKV.")
    rounding: str = knob(
        "sum", choices=("sum", "each"), help="Whether heads' budgets are rounded to the layer's sum, or each by itself."
    )

    def keep(self, state: LayerState) -> torch.Tensor:
        """The window in every head, and before it the best-scored tokens of each head, as many as its budget allows."""
        windows = self._windows(state)
        scores = window_scores(state, windows, self.pooling, self.kernel)
        in_window = recent(state, windows)
        candidates = state.occupied & ~in_window
        hits = _hits(scores, candidates, state.capacity - windows)
        divide = adaptive if self.rounding == "sum" else adaptive_each
        budgets = torch.tensor([divide(row, self.floor) for row in hits.tolist()], device=scores.device)
        return keep_top(scores, budgets, candidates) | in_window

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """One pass of the window's queries over the keys: `2 Hq W N D` FLOPs; keys read, scores written."""
        return observing_cost(state, int(self._windows(state).max()))

    def _windows(self, state: LayerState) -> torch.Tensor:
        """`[B]` last tokens that stay in each row; those of this call vote with their queries."""
        return torch.minimum(state.capacity // 2, state.newest.view(-1) + 1).clamp(1, self.window)


def _hits(scores: torch.Tensor, candidates: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """`[B, H]` how many of a layer's best `H mean[b]` candidates each head has."""
    num_heads = scores.shape[1]
    scores, candidates = (tensor.transpose(1, 2).flatten(1)[:, None] for tensor in (scores, candidates))
    return keep_top(scores, mean * num_heads, candidates).unflatten(-1, (-1, num_heads)).sum((1, 2))
