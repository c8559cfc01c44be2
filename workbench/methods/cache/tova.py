"""TOVA, token omission via attention: what the newest query looks at. Oren et al. 2024, arXiv 2401.06104."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import QUERIES, LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import EVERY_STEP, CacheMethod, keep_top, observe_window, observing_cost, recent


@register
@dataclass(frozen=True)
class TOVA(CacheMethod):
    """Keeps the tokens the newest query attends to most, the same ones in all heads of a layer, at every step."""

    name: ClassVar[str] = "tova"
    paper: ClassVar[str] = "Oren et al. 2024, arXiv 2401.06104"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES})
    acts: ClassVar[frozenset[str]] = EVERY_STEP
    rowwise: ClassVar[bool] = True

    budget: Budget = budget_knob(0.2)
    keep_newest: bool = knob(False, help="Whether the newest token always stays, as in kvpress; in the paper it may go too.")

    def keep(self, state: LayerState) -> torch.Tensor:
        """The tokens of highest attention from the newest query, averaged over all query heads."""
        scores = observe_window(state, 1).mean((1, 2))[:, None].expand(state.positions.shape)
        if self.keep_newest:
            scores = scores.masked_fill(recent(state, torch.ones_like(state.capacity)), torch.inf)
        return keep_top(scores, state.capacity, state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """One query over the keys: `2 Hq N D` FLOPs; keys read, scores written."""
        return observing_cost(state, 1)
