"""CAKE, cascading and adaptive KV eviction with layer preferences. Qin et al. 2025, arXiv 2503.12491."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import AT_END, CASCADE, QUERIES, REPORT, LayerState, Side
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import (
    EVERY_STEP,
    PREFILL_ONLY,
    CacheMethod,
    keep_top,
    observe_window,
    observing_cost,
    pool_scores,
    recent,
    reduce_heads,
)
from workbench.methods.cache.budgets import by_preference

_SCORE = "score"
_KERNEL = 5


@register
@dataclass(frozen=True)
class CAKE(CacheMethod):
    """Gives more room to layers whose attention is spread and shifts, while the prompt is read, and keeps those shares."""

    name: ClassVar[str] = "cake"
    paper: ClassVar[str] = "Qin et al. 2025, arXiv 2503.12491"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES})
    acts: ClassVar[frozenset[str]] = EVERY_STEP
    observes: ClassVar[frozenset[str]] = PREFILL_ONLY
    side: ClassVar[Mapping[str, Side]] = {_SCORE: Side()}
    deviations: ClassVar[tuple[str, ...]] = (
        "Each row of a batch has preferences of its own; the paper's code sums them over the batch.",
        "Every prompt over the budget is compressed; the paper's code leaves one that exceeds it by no more than a window.",
        "The window is at most half the budget, so that small budgets still choose.",
        "A window of one query has no variance, so all layers then get the same.",
        "After an appended turn of several tokens the newest query scores, as after a decoded one.",
        "tau1 and tau2 are 1 unless given; the paper's code has a table of them by model and budget.",
    )

    budget: Budget = budget_knob(0.2)
    window: int = knob(32, low=1, high=1024, unit="tokens", help="Last queries that vote; their own tokens always stay.")
    tau1: float = knob(
        1.0, low=0.01, high=100.0, help="Temperature of the entropy in a layer's preference: higher counts less."
    )
    tau2: float = knob(
        1.0, low=0.01, high=100.0, help="Temperature of the variance in a layer's preference: higher counts less."
    )
    gamma: float = knob(200.0, low=0.0, high=1e6, help="Weight of a token's variance over the window beside its mean.")
    cascade: bool = knob(True, help="Whether earlier layers evict again as each layer reports; false: all at the prompt's end.")

    @property
    def joint(self) -> str:
        """The budget is divided anew after each layer, or once after the last."""
        return CASCADE if self.cascade else AT_END

    def observe(self, state: LayerState) -> dict[str, torch.Tensor]:
        """The tokens' scores, infinite for the window's own, and the layer's preference `[B]`: H^(1/tau1) V^(1/tau2).

        H is the entropy and V the variance over the window's queries of what these give to the tokens before them, summed
        over heads, and H over queries too.
        """
        windows = self._windows(state)
        attention = observe_window(state, int(windows.max()))
        voting = attention.shape[2]  # of a decode step that divides after a swap there is one query
        votes = (torch.arange(voting, device=windows.device) >= voting - windows.view(-1, 1))[:, None, :, None]
        mean, variance = mean_and_variance(attention, votes)
        before = ~recent(state, windows).repeat_interleave(attention.shape[1] // state.keys.shape[1], 1)
        seen = attention * (votes & before[:, :, None])
        entropy = -(seen * (seen + 1e-10).log()).sum((1, 2, 3), dtype=torch.float64)
        shift = (variance * before).sum((1, 2), dtype=torch.float64)
        preference = entropy.clamp(min=0) ** (1 / self.tau1) * shift ** (1 / self.tau2)
        order = state.positions.argsort(dim=-1, stable=True)
        pooled = self._pooled(mean + self.gamma * variance, windows, state, order)
        return {_SCORE: torch.empty_like(pooled).scatter_(-1, order, pooled), REPORT: preference}

    def observation_cost(self, state: LayerState) -> tuple[int, int]:
        """One pass of the window's queries over the keys: `2 Hq W N D` FLOPs; keys read, attention and scores written."""
        flops, moved = observing_cost(state, int(self._windows(state).max()))
        return flops, moved + state.side[_SCORE].nbytes

    def share(
        self, reports: Sequence[torch.Tensor], held: Sequence[Sequence[int]], prompt_tokens: Sequence[int], num_layers: int
    ) -> list[list[int]]:
        """The whole budget, of the layers to come as well, divided by the preferences of those that have reported."""
        preferences = torch.stack(list(reports)).tolist()
        rows = []
        for row, prompt in enumerate(prompt_tokens):
            window = self._window(prompt)
            longest = [max(each[row] - window, 0) for each in held]
            total = (self.capacity(prompt) - window) * num_layers
            shares = by_preference([each[row] for each in preferences], total, longest)
            rows.append([window + min(share, most) for share, most in zip(shares, longest, strict=True)])
        return [list(layer) for layer in zip(*rows, strict=True)]

    def keep(self, state: LayerState) -> torch.Tensor:
        """The window and the best of the other tokens: by the scores kept beside them, or by the newest query's attention."""
        # Of few tokens each is the others' neighbour and the means are equal, so ties are broken in the order of the text.
        order = state.positions.argsort(dim=-1, stable=True)
        if state.dividing:
            scores = state.side[_SCORE].gather(-1, order)
        else:
            scores = self._pooled(observe_window(state, 1)[:, :, 0], self._windows(state), state, order)
        stays = keep_top(scores, state.capacity, state.occupied.gather(-1, order))
        return torch.empty_like(stays).scatter_(-1, order, stays)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """Dividing, the scores are read; at a later step one query goes over the keys: `2 Hq N D` FLOPs."""
        return (0, state.side[_SCORE].nbytes) if state.dividing else observing_cost(state, 1)

    def _window(self, prompt_tokens: int) -> int:
        """Queries that vote, in every layer the same."""
        return max(1, min(self.window, self.capacity(prompt_tokens) // 2, prompt_tokens))

    def _windows(self, state: LayerState) -> torch.Tensor:
        """`[B]` queries that vote in each row."""
        return torch.tensor([self._window(prompt) for prompt in state.prompt_tokens.tolist()], device=state.keys.device)

    def _pooled(self, scores: torch.Tensor, windows: torch.Tensor, state: LayerState, order: torch.Tensor) -> torch.Tensor:
        """Scores `[B, Hq, N]` of the tokens before the window, each the mean of its neighbours' in the text.

        Returned are `[B, H, N]` in the order of the text, which `order` says.
        """
        group = scores.shape[1] // state.keys.shape[1]
        is_window = recent(state, windows).gather(-1, order)
        in_text = scores.gather(-1, order.repeat_interleave(group, 1)).masked_fill(is_window.repeat_interleave(group, 1), 0)
        pooled = pool_scores(in_text, "avg", _KERNEL)
        return reduce_heads(pooled, state.keys.shape[1]).masked_fill(is_window, torch.inf)


def mean_and_variance(rows: torch.Tensor, votes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and unbiased variance over the queries that vote, `[..., W, N]` to `[..., N]`; of one query the variance is 0."""
    count = votes.sum(-2)
    mean = (rows * votes).sum(-2) / count
    variance = ((rows - mean.unsqueeze(-2)) ** 2 * votes).sum(-2) / (count - 1).clamp(min=1)
    return mean, variance
