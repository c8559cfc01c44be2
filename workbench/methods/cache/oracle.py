"""Oracle: what the model's own continuation will look at. An upper bound for deciding at the end of the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import FORESIGHT, LayerState, Rehearsal
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top, reduce_heads


@register
@dataclass(frozen=True)
class Oracle(CacheMethod):
    """Keeps what the model's own greedy continuation, decoded densely first, attends to most: a bound, not a technique.

    It knows what the model would say next, not a question that is asked later, and bounds the mass retained for the former.
    """

    name: ClassVar[str] = "oracle"
    paper: ClassVar[str] = "none: the offline bound of Zhang et al. 2023, arXiv 2306.14048"
    needs: ClassVar[frozenset[str]] = frozenset({FORESIGHT})

    budget: Budget = budget_knob(0.2)
    horizon: int = knob(32, low=1, high=4096, unit="tokens", help="Tokens of the continuation whose attention is summed.")

    def rehearsal(self, rows: Sequence[Sequence[int]]) -> Rehearsal:
        """The greedy continuation, one token after the other."""
        return Rehearsal(self.horizon)

    def keep(self, state: LayerState) -> torch.Tensor:
        """The tokens of highest attention from the continuation, summed over it and over a kv head's query heads."""
        return keep_top(reduce_heads(state.foresight, state.keys.shape[1]), state.capacity, state.occupied)
