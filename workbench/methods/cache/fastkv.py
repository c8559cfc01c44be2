"""FastKV: after a middle layer only the attended tokens go on. Jo et al. 2025, arXiv 2502.01068."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import QUERIES, THINNING, LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top, observing_cost, window_scores


@register
@dataclass(frozen=True)
class FastKV(CacheMethod):
    """Keeps what SnapKV would, and reads the prompt faster: after a middle layer only the attended tokens go on."""

    name: ClassVar[str] = "fastkv"
    paper: ClassVar[str] = "Jo et al. 2025, arXiv 2502.01068"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES, THINNING})
    deviations: ClassVar[tuple[str, ...]] = (
        "At least as many tokens go on as the budget keeps, so that every layer fills its budget; in the paper's code a budget "
        "above the rate leaves the later layers with less.",
        "The window is at most half the budget, so that small budgets still choose.",
    )

    budget: Budget = budget_knob(0.1)
    before: float = knob(
        0.5, low=0.0, high=1.0, unit="share of layers", help="First layers that see the whole prompt; one at least."
    )
    rate: float = knob(
        0.2,
        low=0.0,
        high=1.0,
        unit="share of prompt",
        help="Tokens that go on, under a budget that is a fraction of the prompt.",
    )
    length: int = knob(2048, low=1, high=2**20, unit="tokens", help="Tokens that go on, under a budget in tokens.")
    window: int = knob(
        8, low=1, high=1024, unit="tokens", help="Last queries that vote; their own tokens always stay and go on."
    )
    kernel: int = knob(
        7, unit="tokens", help="Width of the pooling that lifts a token's neighbours; odd.", choices=(1, 3, 5, 7, 9, 11, 13)
    )
    pooling: str = knob("max", choices=("avg", "max"), help="How scores are pooled.")

    def thins_after(self, num_layers: int) -> tuple[int, ...]:
        """The last of the layers that see the whole prompt."""
        whole = max(1, round(self.before * num_layers))
        return (whole - 1,) if whole < num_layers else ()

    def keep(self, state: LayerState) -> torch.Tensor:
        """The window, and in each kv head the best-scored tokens before it."""
        return keep_top(self._scores(state), state.capacity, state.occupied)

    def keep_and_pass(self, state: LayerState) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and of all heads together the best-scored tokens, in the order of the text."""
        scores = self._scores(state)
        keep = keep_top(scores, state.capacity, state.occupied)
        passing = keep_top(scores.sum(1, keepdim=True), self._going_on(state), state.occupied[:, :1])
        return keep, passing[:, 0]

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """One pass of the window's queries over the keys: `2 Hq W N D` FLOPs; keys read, scores written."""
        return observing_cost(state, int(self._windows(state).max()))

    def _scores(self, state: LayerState) -> torch.Tensor:
        """`[B, H, N]`; the mean over a group ranks as the paper's sum does."""
        return window_scores(state, self._windows(state), self.pooling, self.kernel)

    def _windows(self, state: LayerState) -> torch.Tensor:
        """`[B]` last tokens that vote in each row."""
        return torch.minimum(state.capacity // 2, state.newest.view(-1) + 1).clamp(1, self.window)

    def _going_on(self, state: LayerState) -> torch.Tensor:
        """`[B]` tokens that go on: all of a prompt within its budget."""
        tokens = state.newest.view(-1).long() + 1
        wanted = (tokens.double() * self.rate).long() if isinstance(self.budget, float) else tokens.clamp(max=self.length)
        return torch.where(state.capacity >= tokens, tokens, torch.maximum(wanted, state.capacity))
