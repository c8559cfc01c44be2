"""KeyDiff: keys unlike the others. Park et al. 2025, arXiv 2504.15364."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from workbench.engine.policy import LayerState
from workbench.methods.base import Budget, budget_knob, register
from workbench.methods.cache.base import CacheMethod, keep_top


@register
@dataclass(frozen=True)
class KeyDiff(CacheMethod):
    """Keeps, once the prompt is read, the tokens whose keys point away from the mean key; it needs no query."""

    name: ClassVar[str] = "keydiff"
    paper: ClassVar[str] = "Park et al. 2025, arXiv 2504.15364"
    deviations: ClassVar[tuple[str, ...]] = (
        "The prompt is computed densely and cut once, at its end; the paper reads it in blocks and cuts after each, so that "
        "later blocks attend to what is left.",
    )

    budget: Budget = budget_knob(0.2)

    def keep(self, state: LayerState) -> torch.Tensor:
        """The tokens of smallest cosine to the anchor, the mean of the normalised keys."""
        directions = F.normalize(state.keys.float(), dim=-1).masked_fill(~state.occupied[..., None], 0)
        anchor = F.normalize(directions.sum(2, keepdim=True), dim=-1)
        likeness = (directions @ anchor.transpose(-1, -2)).squeeze(-1)
        return keep_top(-likeness, state.capacity, state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """Every key times the anchor: `2 H N D` FLOPs; keys read for the anchor and once more, scores written."""
        return 2 * state.keys.numel(), 2 * state.keys.nbytes + 4 * state.positions.numel()
