"""StreamingLLM: the first few tokens and the most recent ones. Xiao et al. 2023, arXiv 2309.17453."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import EVERY_STEP, CacheMethod, recent


@register
@dataclass(frozen=True)
class StreamingLLM(CacheMethod):
    """Keeps the first few tokens (attention sinks) and the most recent ones, at every step."""

    name: ClassVar[str] = "streaming-llm"
    paper: ClassVar[str] = "Xiao et al. 2023, arXiv 2309.17453"
    acts: ClassVar[frozenset[str]] = EVERY_STEP
    rowwise: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "By default positions are the true ones; the paper caches unrotated keys and rotates by cache slot, as positions=slot "
        "does (exactly, where a model's frequencies do not change with the length).",
        "The prompt is computed densely and cut at its end; the paper's demo evicts before each chunk.",
    )

    budget: Budget = budget_knob(0.2)
    sinks: int = knob(4, low=0, high=1024, unit="tokens", help="First tokens that always stay; they come out of the budget.")
    positions: str = knob("true", choices=("true", "slot"), help="Whether tokens stand at their own positions or close ranks.")

    @property
    def by_slot(self) -> bool:
        """Whether tokens that stay close ranks."""
        return self.positions == "slot"

    def keep(self, state: LayerState) -> torch.Tensor:
        """The first `sinks` tokens and as many recent ones as the budget leaves, at least one."""
        num_sinks = torch.clamp(state.capacity - 1, min=0, max=self.sinks)
        is_sink = (state.positions < num_sinks.view(-1, 1, 1)) & state.occupied
        return is_sink | recent(state, state.capacity - num_sinks)
