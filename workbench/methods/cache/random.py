"""Random: the control that any score must beat."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top

_WORD = 0xFFFFFFFF


@register
@dataclass(frozen=True)
class Random(CacheMethod):
    """Keeps tokens drawn at random once the prompt is read: a control, not a technique."""

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "none: a control"

    budget: Budget = budget_knob(0.2)
    seed: int = knob(0, low=0, high=2**31 - 1, help="Another seed draws other tokens.")

    def keep(self, state: LayerState) -> torch.Tensor:
        """The tokens whose seed, layer, head and position hash highest: a prompt keeps the same ones in any batch."""
        heads = torch.arange(state.keys.shape[1], device=state.keys.device)[:, None]
        drawn = _mix(_mix(_mix(torch.full_like(heads, self.seed)) + state.layer) + heads)
        scores = _mix(drawn + state.positions.long()) >> 8  # what is left, 24 bits, float32 holds exactly
        return keep_top(scores.float(), state.capacity, state.occupied)


def _mix(word: torch.Tensor) -> torch.Tensor:
    """Scrambles 32-bit words held in int64: the finaliser of MurmurHash3."""
    word = word & _WORD
    word = ((word ^ (word >> 16)) * 0x85EBCA6B) & _WORD
    word = ((word ^ (word >> 13)) * 0xC2B2AE35) & _WORD
    return word ^ (word >> 16)
