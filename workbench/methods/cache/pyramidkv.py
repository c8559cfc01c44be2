"""PyramidKV: SnapKV's choice, with more room in early layers than in late ones. Cai et al. 2024, arXiv 2406.02069."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import QUERIES, LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top, observing_cost, window_scores
from workbench.methods.cache.budgets import pyramid


@register
@dataclass(frozen=True)
class PyramidKV(CacheMethod):
    """Keeps what SnapKV would, but many tokens in the first layer and few in the last, for the same sum."""

    name: ClassVar[str] = "pyramidkv"
    paper: ClassVar[str] = "Cai et al. 2024, arXiv 2406.02069"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES})
    deviations: ClassVar[tuple[str, ...]] = (
        "Layer budgets sum to exactly the uniform ones; in the paper's code the whole-number step lets the sum exceed them.",
        "Only layers without a sliding window take part in the pyramid.",
        "Query heads of a group share one kept set (mean after pooling), as in SnapKV here.",
        "The window is at most half the mean budget, so that small budgets still choose; the paper's code needs more than it.",
    )

    budget: Budget = budget_knob(0.2)
    window: int = knob(8, low=1, high=1024, unit="tokens", help="Last queries that vote; their own tokens always stay.")
    kernel: int = knob(
        7, unit="tokens", help="Width of the pooling that lifts a token's neighbours; odd.", choices=(1, 3, 5, 7, 9, 11, 13)
    )
    pooling: str = knob("max", choices=("avg", "max"), help="How scores are pooled.")
    beta: int = knob(20, low=1, high=1000, help="The mean budget before the window is this many times the last layer's.")

    def allocate(self, prompt_tokens: int, num_layers: int) -> list[int]:
        """A pyramid over the tokens before the window; uniform where the prompt is shorter than twice their mean."""
        capacity, window = self.capacity(prompt_tokens), self._window(prompt_tokens)
        before = capacity - window
        if prompt_tokens <= capacity or prompt_tokens < 2 * before:
            return [capacity] * num_layers
        return [window + share for share in pyramid(before, prompt_tokens - window, num_layers, self.beta)]

    def keep(self, state: LayerState) -> torch.Tensor:
        """The window, and the best-scored tokens before it, as many as the layer's share allows."""
        scores = window_scores(state, self._windows(state), self.pooling, self.kernel)
        return keep_top(scores, state.capacity, state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """One pass of the window's queries over the keys: `2 Hq W N D` FLOPs; keys read, scores written."""
        return observing_cost(state, int(self._windows(state).max()))

    def _window(self, prompt_tokens: int) -> int:
        """Queries that vote, in every layer the same."""
        return max(1, min(self.window, self.capacity(prompt_tokens) // 2, prompt_tokens))

    def _windows(self, state: LayerState) -> torch.Tensor:
        """`[B]` queries that vote in each row."""
        lengths = (state.newest.view(-1) + 1).tolist()
        windows = torch.tensor([self._window(length) for length in lengths], device=state.keys.device)
        return torch.minimum(windows, state.capacity)
