"""DapQ: queries of made-up tokens at the positions of the answer. 2026, known here from two reading notes of the paper."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import FORESIGHT, LayerState, Rehearsal
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, foreseen_scores, keep_top, pseudo_tokens


@register
@dataclass(frozen=True)
class DapQ(CacheMethod):
    """Keeps what made-up tokens, run after the prompt at the positions of the answer and taken back, attend to most."""

    name: ClassVar[str] = "dapq"
    paper: ClassVar[str] = "DapQ: decoding-aligned position-aware pseudo queries, 2026"
    needs: ClassVar[frozenset[str]] = frozenset({FORESIGHT})
    deviations: ClassVar[tuple[str, ...]] = (
        "Written from two reading notes of the paper, without its code: rows are softmax over the prompt and the earlier "
        "made-up tokens, not made to sum to one again over the prompt, and query heads of a group are averaged.",
        "The made-up tokens are a second forward call on the prompt's cache; the paper appends them to the prompt.",
        "A prompt shorter than its part of the made-up tokens is repeated to fill them.",
    )

    budget: Budget = budget_knob(0.2)
    tokens: int = knob(32, low=1, high=1024, unit="tokens", help="Tokens run after the prompt.")
    source: str = knob(
        "pseudo",
        choices=("pseudo", "continuation"),
        help="First and last tokens of the prompt, or its true greedy continuation.",
    )
    prefix: int = knob(4, low=0, high=4096, unit="tokens", help="Of the pseudo tokens, those from the start of the prompt.")
    positions: str = knob(
        "answer", choices=("answer", "prompt"), help="Rotated as the tokens to come, or as the last ones of the prompt."
    )
    keep_recent: int = knob(
        0, low=0, high=1024, unit="tokens", help="Last tokens that always stay; they come out of the budget."
    )
    pooling: str = knob("off", choices=("off", "max", "avg"), help="Whether and how a high score lifts its neighbours.")
    kernel: int = knob(7, unit="tokens", help="Width of the pooling; odd.", choices=(1, 3, 5, 7, 9, 11, 13))

    def rehearsal(self, rows: Sequence[Sequence[int]]) -> Rehearsal:
        """The pseudo tokens of each row, or its continuation."""
        shift = 0 if self.positions == "answer" else -self.tokens
        if self.source == "continuation":
            return Rehearsal(self.tokens, shift=shift)
        return Rehearsal(self.tokens, pseudo_tokens(rows, self.tokens, self.prefix), shift)

    def keep(self, state: LayerState) -> torch.Tensor:
        """The tokens of highest attention from those run after the prompt."""
        scores = foreseen_scores(state, self.pooling, self.kernel, self.keep_recent)
        return keep_top(scores, state.capacity, state.occupied)
