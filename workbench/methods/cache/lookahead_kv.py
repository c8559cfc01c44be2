"""LookaheadKV: trained soft tokens stand in for the answer. ICLR 2026, known here from two reading notes of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import FORESIGHT, LayerState, Rehearsal
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, foreseen_scores, keep_top, pseudo_tokens

PREFIX = 4
"""Of the pseudo tokens, those from the start of the prompt, as in DapQ."""


@register
@dataclass(frozen=True)
class LookaheadKV(CacheMethod):
    """Keeps what soft tokens, trained to look where the model's answers look, attend to most after the prompt."""

    name: ClassVar[str] = "lookahead-kv"
    paper: ClassVar[str] = "LookaheadKV, ICLR 2026"
    needs: ClassVar[frozenset[str]] = frozenset({FORESIGHT})
    deviations: ClassVar[tuple[str, ...]] = (
        "Written from two reading notes of the paper, without its code; soft tokens stand at the positions after the prompt, "
        "and query heads of a group are averaged.",
        "The soft tokens are a second forward call on the prompt's cache; the paper appends them to the prompt.",
        "In a mixture of experts only attention and parts that every token passes get adapters: routers and experts have none, "
        "so soft tokens are routed as any token is.",
    )

    budget: Budget = budget_knob(0.2)
    mode: str = knob(
        "trained",
        choices=("trained", "pseudo", "oracle"),
        help="Trained soft tokens, ends of the prompt, or the true continuation.",
    )
    tokens: int = knob(32, low=1, high=1024, unit="tokens", help="Tokens run if not trained, where training has set them.")
    keep_recent: int = knob(
        0, low=0, high=1024, unit="tokens", help="Last tokens that always stay; they come out of the budget."
    )
    pooling: str = knob("off", choices=("off", "max", "avg"), help="Whether and how a high score lifts its neighbours.")
    kernel: int = knob(7, unit="tokens", help="Width of the pooling; odd.", choices=(1, 3, 5, 7, 9, 11, 13))

    def rehearsal(self, rows: Sequence[Sequence[int]]) -> Rehearsal:
        """The soft tokens, or what stands in for them."""
        if self.mode == "trained":
            return Rehearsal(trained=True)
        return Rehearsal(self.tokens, pseudo_tokens(rows, self.tokens, PREFIX) if self.mode == "pseudo" else None)

    def keep(self, state: LayerState) -> torch.Tensor:
        """The tokens of highest attention from those run after the prompt."""
        scores = foreseen_scores(state, self.pooling, self.kernel, self.keep_recent)
        return keep_top(scores, state.capacity, state.occupied)
