"""DES-Vote: a coreset of a fixed size that tokens vote for with their gate weights. arXiv 2602.00879."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from workbench.engine.experts import Routed, RouteState
from workbench.methods.base import knob, register
from workbench.methods.routing.base import ExpertMethod
from workbench.methods.routing.coreset import decision_bytes, favourites, route_inside
from workbench.trace.anatomy import Anatomy


@register
@dataclass(frozen=True)
class DesVote(ExpertMethod):
    """Gives the tokens of a call no expert but those that got most of their votes; each still gets as many as before.

    A vote is a gate weight of an expert among a token's own top-k. Unlike DES-Seq it says beforehand how many experts are
    fetched, and a token in the minority may lose even its first choice.
    """

    name: ClassVar[str] = "des-vote"
    paper: ClassVar[str] = "Dynamic Expert Sharing, 2026 (arXiv 2602.00879)"
    deviations: ClassVar[tuple[str, ...]] = (
        "The tokens that share are all of one forward call, not a block of a diffusion model: a prompt, an appended turn, or a "
        "decode step over the rows of a batch.",
        "The coreset has at least one expert. Where fewer experts than its size got a vote, those of lowest number fill it up.",
        "A gate that chooses groups of experts first prefers these inside the coreset, and goes to others where they lack.",
    )

    tokenwise: ClassVar[bool] = False
    sweep: ClassVar[tuple[dict[str, float], ...]] = tuple({"beta": beta} for beta in (0.75, 0.5, 0.375, 0.25, 0.125))

    beta: float = knob(0.6, low=0.0, high=1.0, help="Size of the coreset, as a share of the layer's experts.")

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self:
        """All experts are elected."""
        return cls(beta=1.0)

    def size(self, num_experts: int) -> int:
        """Experts in the coreset."""
        return max(1, round(self.beta * num_experts))

    def route(self, state: RouteState) -> Routed | None:
        """Every token's best experts of those elected. A single token elects its own, so nothing changes if they fit."""
        size, top_k = self.size(state.num_experts), state.experts.shape[-1]
        if size >= state.num_experts or (len(state.experts) == 1 and size >= top_k):
            return None
        return route_inside(state, elected(state, size))

    def decision_cost(self, state: RouteState) -> tuple[int, int]:
        """No matrix product."""
        return 0, decision_bytes(state)


def elected(state: RouteState, size: int) -> torch.Tensor:
    """`[E]` bool: the experts of most votes, which are the scores each token's gate gives to its own top-k."""
    own = favourites(state, state.experts.shape[-1])
    votes = (state.gate.scores(state.logits) * own).sum(0)
    best = votes.argsort(descending=True, stable=True)[:size]
    return torch.zeros_like(own[0]).scatter_(0, best, True)
