"""Another number of experts for every token, chosen and weighed as the model's own gate does."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from workbench.engine.experts import Routed, RouteState
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.routing.base import ExpertMethod, within
from workbench.trace.anatomy import Anatomy


@register
@dataclass(frozen=True)
class TopK(ExpertMethod):
    """Gives every token its `k` best experts, whatever number the model was trained with.

    Fewer experts are the simplest way to save expert bytes, and the one every other method is held against.
    """

    name: ClassVar[str] = "top-k"
    paper: ClassVar[str] = "Shazeer et al., 2017 (arXiv 1701.06538)"

    k: int = knob(1, low=1, unit="experts", help="Experts a token.")

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self | None:
        """As many experts as the model gives, if that is one number in all layers."""
        counts = {layer.experts.top_k for layer in anatomy.layers if layer.experts is not None}
        return cls(k=counts.pop()) if len(counts) == 1 else None

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError if a layer has fewer experts."""
        super().check(anatomy)
        for layer in anatomy.layers:
            if layer.experts is not None and self.k > layer.experts.num_experts:
                raise UserError(
                    f"k={self.k} experts a token are more than the {layer.experts.num_experts} that layer {layer.index} has; "
                    "give a smaller k."
                )

    def route(self, state: RouteState) -> Routed | None:
        """The `k` best; none other than the model's own where that is what it gives."""
        if self.k == state.experts.shape[-1]:
            return None
        return within(state, torch.ones(state.num_experts, dtype=torch.bool, device=state.logits.device), self.k)
