"""DES-Seq: a coreset of every token's first few experts, and all tokens routed inside it. arXiv 2602.00879."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

from workbench.engine.experts import Routed, RouteState
from workbench.methods.base import knob, register
from workbench.methods.routing.base import ExpertMethod
from workbench.methods.routing.coreset import decision_bytes, favourites, route_inside
from workbench.trace.anatomy import Anatomy


@register
@dataclass(frozen=True)
class DesSeq(ExpertMethod):
    """Gives the tokens of a call no expert but the first `k` of each of them; each still gets as many as the model gives.

    A token keeps its best experts, and fills up with what others fetch anyway. It saves where several tokens are in flight: a
    prompt, a turn that is appended, a batch. A single token is left with its first `k`.
    """

    name: ClassVar[str] = "des-seq"
    paper: ClassVar[str] = "Dynamic Expert Sharing, 2026 (arXiv 2602.00879)"
    deviations: ClassVar[tuple[str, ...]] = (
        "The tokens that share are all of one forward call, not a block of a diffusion model: a prompt, an appended turn, or a "
        "decode step over the rows of a batch. A prompt of hundreds of tokens shares nearly all experts anyway.",
        "A gate that chooses groups of experts first prefers these inside the coreset, and goes to others where they lack.",
    )

    tokenwise: ClassVar[bool] = False
    sweep: ClassVar[tuple[dict[str, int], ...]] = ({"k": 1},)

    k: int = knob(
        1,
        low=1,
        unit="experts",
        help="Experts each token puts into the coreset; from the model's own top-k on nothing changes.",
    )

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self:
        """Every token's whole choice is in the coreset."""
        return cls(k=max(layer.experts.top_k for layer in anatomy.layers if layer.experts is not None))

    def route(self, state: RouteState) -> Routed | None:
        """Every token's best experts of the union of all first `k`."""
        if self.k >= state.experts.shape[-1]:
            return None
        return route_inside(state, favourites(state, self.k).any(0))

    def decision_cost(self, state: RouteState) -> tuple[int, int]:
        """No matrix product."""
        return 0, decision_bytes(state)
