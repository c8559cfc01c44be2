"""LazyEviction: tokens that are looked at again and again, seldom decided. Zhang et al. 2025, arXiv 2506.15969."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import QUERIES, LayerState, Side
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top, observing_cost, recent
from workbench_kernels.attention_rows import attention_rows

_AFTER_PROMPT = frozenset({"append", "decode"})
_BLOCK = 32
"""Queries of an appended turn that are looked at together."""


@register
@dataclass(frozen=True)
class LazyEviction(CacheMethod):
    """Keeps, every so many decoded tokens, the latest and those that may recur: looked at of late or at long intervals."""

    name: ClassVar[str] = "lazy-eviction"
    paper: ClassVar[str] = "Zhang et al. 2025, arXiv 2506.15969"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES})
    acts: ClassVar[frozenset[str]] = _AFTER_PROMPT
    rowwise: ClassVar[bool] = True
    observes: ClassVar[frozenset[str]] = _AFTER_PROMPT
    side: ClassVar[Mapping[str, Side]] = {"last": Side(torch.int32, -1), "mri": Side(torch.int32)}
    deviations: ClassVar[tuple[str, ...]] = (
        "A kv head is a token's unit: it is looked at if any query head of the group looks; the paper's code stores K and V "
        "for every query head.",
        "Steps and intervals are 32-bit integers, exact at any length; the paper's code keeps them in the model's dtype.",
        "Each token of an appended turn is a step, and the method decides at the turn's end if its step has come meanwhile.",
        "A window as large as the budget is cut to half of it, so that small budgets still choose.",
        "formula='paper' changes the first term alone: the second is the code's, since the paper's is not given in numbers.",
    )

    budget: Budget = budget_knob(0.5)
    window: int = knob(128, low=1, high=65536, unit="tokens", help="Tokens between decisions, and latest tokens that stay.")
    alpha: float = knob(1e-4, low=0.0, high=1.0, help="Attention from which on a token counts as looked at.")
    formula: str = knob("code", choices=("code", "paper"), help="How importance falls with the time since the last look.")

    @property
    def every(self) -> int:
        """One decision a window."""
        return self.window

    def observe(self, state: LayerState) -> dict[str, torch.Tensor]:
        """`last`, the step at which a token was last looked at, and `mri`, the most steps between two looks, anew."""
        num_queries, now = state.queries.shape[2], state.since_prompt
        before = now - num_queries
        own = now - (state.newest - state.positions)  # the step of each token, below 1 for those of the prompt
        start = (own - 1).clamp(min=before).to(torch.int32)
        last = start.where(state.side["last"] < 0, state.side["last"])
        mri = state.side["mri"]
        for first in range(0, num_queries, _BLOCK):
            stop = min(first + _BLOCK, num_queries)
            looks = self._looks(state, first, stop)
            steps = torch.arange(before + first + 1, before + stop + 1, dtype=torch.int32, device=last.device).view(-1, 1)
            times = torch.cat([last.unsqueeze(2), steps * looks], 2).cummax(2).values
            mri = mri.maximum(times.diff(dim=2).amax(2))
            last = times[:, :, -1]
        return {"last": last, "mri": mri}

    def observation_cost(self, state: LayerState) -> tuple[int, int]:
        """All queries of the call over the keys: `2 Hq Q N D` FLOPs; keys read, attention written, two integers changed."""
        flops, moved = observing_cost(state, state.queries.shape[2])
        return flops, moved + 2 * sum(tensor.nbytes for tensor in state.side.values())

    def keep(self, state: LayerState) -> torch.Tensor:
        """The latest tokens, a window of them, and the most important of the others."""
        scores = importance(state.since_prompt, state.side["last"], state.side["mri"], self.formula)
        latest = state.capacity.clamp(max=self.window).where(state.capacity > self.window, (state.capacity + 1) // 2)
        return keep_top(scores.masked_fill(recent(state, latest), torch.inf), state.capacity, state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """The two integers of each token are read."""
        return 0, sum(tensor.nbytes for tensor in state.side.values())

    def _looks(self, state: LayerState, first: int, stop: int) -> torch.Tensor:
        """`[B, H, Q, N]` whether any query head of the group gives a token alpha, for queries `first` to `stop` of the call."""
        num_slots = state.keys.shape[2]
        there = num_slots - state.queries.shape[2] + stop
        occupied = state.occupied[:, :, :there] if bool((state.positions < 0).any()) else None
        rows = attention_rows(state.queries[:, :, first:stop], state.keys[:, :, :there], state.scaling, occupied=occupied)
        return torch.nn.functional.pad(rows.amax(2) >= self.alpha, (0, num_slots - there))


def importance(now: int, last: torch.Tensor, mri: torch.Tensor, formula: str = "code") -> torch.Tensor:
    """How likely a token is looked at again: high if the last look is recent for its interval, or the interval is short."""
    since, interval = (now - last).float(), mri.float()
    late = since / (interval + 1e-5)
    recurring = 2 * torch.sigmoid(-late - 1 if formula == "code" else -late)
    return recurring + torch.where(mri == 0, 0, 2 * torch.sigmoid(1 - interval))
