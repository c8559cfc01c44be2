"""DynMoLE: as many experts as a token's router is unsure of. Li et al. 2025, arXiv 2504.00661."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch

from workbench.engine.experts import Routed, RouteState
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.routing.base import ExpertMethod
from workbench.trace.anatomy import Anatomy

_SHANNON = 1e-6
"""How near q has to be to 1 for the limit to be taken."""


@register
@dataclass(frozen=True)
class DynMoLE(ExpertMethod):
    """Gives a token the experts that hold most of its router's probability, and all of them where that is spread out.

    Spread is the Tsallis entropy `(1 - sum p^q) / (q - 1)`; with q = 1.1 and E experts it is at most `10 (1 - E^-0.1)`, 1.88
    for eight, so what a threshold means depends on E. The experts a token got on average are in the table `routing`: the sum of
    its `tokens` over experts, by the tokens of the step.
    """

    name: ClassVar[str] = "dynmole"
    paper: ClassVar[str] = "Li et al. 2025, arXiv 2504.00661"
    sweep: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        {"threshold": math.inf, "keep_top_k": 1, "top_p": top_p} for top_p in (0.9, 0.75, 0.5, 0.25)
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "It routes to the experts of a trained mixture; the paper's are low-rank adapters, their router trained with this "
        "rule and its entropy in the loss.",
        "Weights are made of the chosen as the model's own gate does, renormalised or not, so that outputs keep their scale; "
        "the paper's are the probabilities as they are.",
        "Experts are taken in the order of the model's gate, which may have a bias or groups; the probabilities are a softmax "
        "over the router's logits, whatever the gate makes of them.",
        "A threshold of 1 or more is compared as any other; the paper's code takes it for no threshold.",
    )

    q: float = knob(1.1, low=0.01, high=10.0, help="Order of the entropy; 1 is Shannon's, in nats.")
    threshold: float = knob(0.9, low=0.0, help="Entropy above which a token is given all experts; inf for never.")
    keep_top_k: int = knob(2, low=1, unit="experts", help="Experts a token is always given: its best.")
    top_p: float = knob(0.75, low=0.0, high=1.0, help="Probability that the experts given, in order, may hold together.")

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self | None:
        """The model's own number of experts and no others, if that is one number in all layers."""
        counts = {layer.experts.top_k for layer in anatomy.layers if layer.experts is not None}
        return cls(threshold=math.inf, top_p=0.0, keep_top_k=counts.pop()) if len(counts) == 1 else None

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError if a layer has fewer experts than are always given."""
        super().check(anatomy)
        for layer in anatomy.layers:
            if layer.experts is not None and self.keep_top_k > layer.experts.num_experts:
                raise UserError(
                    f"keep_top_k={self.keep_top_k} experts a token are more than the {layer.experts.num_experts} that layer "
                    f"{layer.index} has; give a smaller keep_top_k."
                )

    def route(self, state: RouteState) -> Routed | None:
        """The nucleus and the best, or all; slots beyond are left out."""
        if self.top_p == 0 and self.threshold == math.inf and self.keep_top_k == state.experts.shape[-1]:
            return None
        order = state.gate.ranking(state.logits).argsort(dim=-1, descending=True, stable=True)
        odds = state.logits.softmax(-1)
        given = nucleus(odds.gather(-1, order), self.top_p, self.keep_top_k)
        given |= (tsallis_entropy(odds, self.q) > self.threshold)[:, None]
        experts = order.masked_fill(~given, state.num_experts)
        return Routed(experts, state.gate.weights(state.logits, experts).to(state.weights.dtype))


def tsallis_entropy(odds: torch.Tensor, q: float) -> torch.Tensor:
    """`[T]` of probabilities `[T, E]`: `(1 - sum p^q) / (q - 1)`, and at q = 1 its limit, `-sum p ln p`."""
    if abs(q - 1) < _SHANNON:
        return -torch.special.xlogy(odds, odds).sum(-1)
    return (1 - odds.pow(q).sum(-1)) / (q - 1)


def nucleus(odds: torch.Tensor, top_p: float, least: int) -> torch.Tensor:
    """`[T, E]` bool: of probabilities in order, the first few whose sum is at most `top_p`, and the first `least` anyhow."""
    given = odds.cumsum(-1) <= top_p
    given[:, :least] = True
    return given
