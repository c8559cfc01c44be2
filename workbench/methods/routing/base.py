"""What routing methods share.

A method of experts says in `route` what it gives each token, and in `banks` what stands in the experts' place; a method of
dense FFNs defines `forwards` itself.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from workbench.cost.ffn import resident_bytes, weights_bytes
from workbench.engine.banks import banks_of
from workbench.engine.call import Call
from workbench.engine.experts import Bank, Routed, RouteState, expert_forwards
from workbench.engine.replacing import Forward
from workbench.errors import UserError
from workbench.methods.base import Method
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM


@dataclass(frozen=True)
class RoutingMethod(Method):
    """A method of the routing slot."""

    slot: ClassVar[str] = "routing"
    sweep: ClassVar[tuple[Mapping[str, Any], ...]] = ({},)
    """Knobs that save more and more: what a figure of every method shows."""
    tokenwise: ClassVar[bool] = True
    """Whether what is done for a token depends on that token alone, and not on those beside it in the call."""

    leaves_out: ClassVar[bool] = False
    """Whether some layers are given, and hold, only some of the tokens."""

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self | None:
        """The method with knobs under which it leaves a model exactly as it is; None if there are none."""
        return None

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError for a model the method cannot serve."""

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """What to run instead of which modules: see `RoutingPolicy`."""
        raise TypeError(f"{type(self).__name__} must say what it replaces: define forwards(lm, call).")

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of the weights the method computes with, in place of the model's own expert or FFN weights."""
        raise TypeError(f"{type(self).__name__} must say what weights it holds: define resident_bytes(lm).")


@dataclass(frozen=True)
class FfnMethod(RoutingMethod):
    """A method of dense FFNs."""

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError for a model without a dense FFN."""
        if not dense_layers(anatomy):
            raise UserError(
                f"{self.name!r} acts on dense FFNs, and {anatomy.class_name} has none; choose a dense model such as "
                "tiny-dense, or another method."
            )


def dense_layers(anatomy: Anatomy) -> list[int]:
    """The layers that have an FFN and no experts."""
    products = {layer.index: {linear.component for linear in layer.linears} for layer in anatomy.layers}
    return [layer.index for layer in anatomy.layers if layer.experts is None and "mlp" in products[layer.index]]


@dataclass(frozen=True)
class ExpertMethod(RoutingMethod):
    """A method of mixtures of experts."""

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError for a model without experts."""
        if all(layer.experts is None for layer in anatomy.layers):
            raise UserError(
                f"{self.name!r} routes tokens to experts, and {anatomy.class_name} has none that can be told from its modules; "
                "choose a mixture-of-experts model such as tiny-moe, or another method."
            )

    def route(self, state: RouteState) -> Routed | None:
        """What each token of a layer is given; None leaves what the model chose."""
        return None

    def banks(self, lm: LM) -> Mapping[int, Bank]:
        """What stands in the place of the experts of which layers. Made once a model: ask `banks_of(method, lm)` for them."""
        return {}

    def decision_cost(self, state: RouteState) -> tuple[int, int]:
        """FLOPs of matrix products, and bytes moved, that `route` itself adds in a layer: by default none."""
        return 0, 0

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """Forwards of routers and experts."""
        return expert_forwards(lm, call, partial(self._route, call), banks_of(self, lm))

    def _route(self, call: Call, state: RouteState) -> Routed | None:
        """What `route` says, its cost written down."""
        routed = self.route(state)
        flops, moved = self.decision_cost(state) if routed is not None else (0, 0)
        if flops or moved:
            call.work(state.layer, "method", changed=0, flops=flops, bytes=moved)
        return routed

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of all experts and of FFNs beside them: the model's own, where no bank stands in their place."""
        held = resident_bytes(lm.anatomy)
        for index, bank in banks_of(self, lm).items():
            experts = lm.anatomy.layers[index].experts
            held += sum(bank.weight_bytes) - experts.num_experts * weights_bytes(experts.linears, lm.anatomy.element_bytes)
        return held


def within(state: RouteState, allowed: torch.Tensor, count: int) -> Routed:
    """Every token's best `count` experts among those allowed (`[E]` or `[T, E]` bool), as the model's gate ranks and weighs.

    Where fewer are allowed, the slots left over are empty.
    """
    ranking = state.gate.ranking(state.logits).masked_fill(~allowed, -torch.inf)
    best = ranking.topk(count, dim=-1)
    experts = best.indices.masked_fill(best.values == -torch.inf, state.num_experts)
    return Routed(experts, state.gate.weights(state.logits, experts).to(state.weights.dtype))
