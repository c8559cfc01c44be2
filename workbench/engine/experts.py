"""A layer's experts under a routing method: which of them a token is given, and what stands in an expert's place.

Shapes: T tokens of a call, E experts, K those the model gives a token, k those a method gives it, d hidden.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from workbench.engine.call import Call
from workbench.engine.gate import Gate, gates
from workbench.engine.replacing import Forward
from workbench.models.anatomy import expert_modules, router_modules
from workbench.probes.moe import chosen_experts, router_logits
from workbench.trace.anatomy import Anatomy, Experts

if TYPE_CHECKING:
    from workbench.models.load import LM


@dataclass(frozen=True)
class RouteState:
    """One layer's tokens at the moment they are routed."""

    hidden: torch.Tensor
    """`[T, d]` what goes into the experts."""
    logits: torch.Tensor
    """`[T, E]` float32, of the router."""
    experts: torch.Tensor
    """`[T, K]` what the model chose."""
    weights: torch.Tensor
    """`[T, K]` and their weights."""
    gate: Gate
    """How weights follow from logits."""
    positions: torch.Tensor
    """`[B, Q]` position of each token in its row, -1 for padding; flattened it runs over the T tokens."""
    phase: str
    layer: int
    number: int
    """Which of the layers with experts it is."""
    num_layers: int
    """Layers with experts."""

    @property
    def there(self) -> torch.Tensor:
        """`[T]` whether a token is no padding."""
        return self.positions.flatten() >= 0

    @property
    def num_experts(self) -> int:
        """E: also the number that stands for no expert, in a slot that is left out."""
        return self.logits.shape[-1]


@dataclass(frozen=True)
class Routed:
    """What a method gives each token."""

    experts: torch.Tensor
    """`[T, k]`; E in a slot that is left out."""
    weights: torch.Tensor
    """`[T, k]`; 0 there."""


class Bank(Protocol):
    """What stands in the place of a layer's E experts."""

    flops: Sequence[int]
    """Of one token in each expert."""
    weight_bytes: Sequence[int]
    """Read when an expert is hit."""
    token_bytes: Sequence[int]
    """Activations one token moves in each."""

    def compute(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """One expert's output `[n, d]` for n tokens `[n, d]`, not weighted yet."""
        ...


class OwnBank:
    """The model's own experts, one at a time."""

    def __init__(self, module: nn.Module, experts: Experts, element_bytes: int):
        self._alone = [alone(module, number) for number in range(experts.num_experts)]
        sizes = [(linear.in_features, linear.out_features) for linear in experts.linears]
        count = experts.num_experts
        self.flops = [2 * sum(rows * columns for rows, columns in sizes)] * count
        self.weight_bytes = [element_bytes * sum(rows * columns for rows, columns in sizes)] * count
        self.token_bytes = [element_bytes * sum(rows + columns for rows, columns in sizes)] * count

    def compute(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """One expert's output."""
        return apply(self._alone[expert], hidden)


def alone(module: nn.Module, expert: int, **weights: torch.Tensor) -> nn.Module:
    """A copy of an experts module that holds one of them only: the same computation, whatever the family's is.

    `weights` stand in for the module's own of that name, `[1, ...]`; the copy shares the others' memory with the module.
    """
    part = copy.copy(module)
    own = {name: weight[expert : expert + 1] for name, weight in module.named_parameters(recurse=False) if weight.ndim > 1}
    part._parameters = {**module._parameters, **own, **weights}
    part.num_experts = 1
    return part


def apply(part: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
    """What `alone` gave, over n tokens `[n, d]`. The class's forward is called, so that the module's hooks stay out.

    It is the family's own code, not a grouped kernel that transformers may put around it: those want aligned sizes.
    """
    index = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
    return inspect.unwrap(type(part).forward)(part, hidden, index, hidden.new_ones(len(hidden), 1))


def by_expert(bank: Bank, hidden: torch.Tensor, routed: Routed) -> torch.Tensor:
    """The weighted sum of every token's experts `[T, d]`; only experts that are hit are computed."""
    out = torch.zeros_like(hidden)
    for expert in routed.experts.unique().tolist():
        if expert >= len(bank.flops):
            continue
        tokens, slots = (routed.experts == expert).nonzero(as_tuple=True)
        part = bank.compute(expert, hidden[tokens]) * routed.weights[tokens, slots, None].to(hidden.dtype)
        out.index_add_(0, tokens, part.to(out.dtype))
    return out


Route = Callable[[RouteState], Routed | None]
"""What a method does with a layer's tokens; None leaves them as the model chose."""


def expert_forwards(lm: LM, call: Call, route: Route, banks: Mapping[int, Bank]) -> Mapping[nn.Module, Forward]:
    """Forwards of routers and experts modules that route by a method and compute with its banks, where it has them."""
    known, modules, routers = gates(lm), expert_modules(lm.model), router_modules(lm.model)
    forwards: dict[nn.Module, Forward] = {}
    for number, (layer, module) in enumerate(modules.items()):
        router = _Router(layer, call)
        place = (layer, number, len(modules))
        forwards[routers[layer]] = router.forward
        forwards[module] = _Layer(module, lm.anatomy, call, known[layer], router, place, route, banks.get(layer)).forward
    return forwards


class _Router:
    """Runs a router and keeps its logits for the experts that follow: computed once more, since what routers return differs."""

    def __init__(self, layer: int, call: Call):
        self._layer, self._call = layer, call
        self.logits: torch.Tensor | None = None

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        weight = original.__self__.weight
        self.logits = router_logits(original.__self__, args, kwargs)
        tokens, (rows, columns) = len(self.logits), weight.shape
        moved = weight.element_size() * (rows * columns + tokens * columns) + 4 * tokens * rows
        self._call.work(self._layer, "method", changed=0, flops=2 * tokens * rows * columns, bytes=moved, weight_bytes=0)
        return original(*args, **kwargs)


class _Layer:
    """One layer's experts under a method."""

    def __init__(
        self,
        module: nn.Module,
        anatomy: Anatomy,
        call: Call,
        gate: Gate,
        router: _Router,
        place: tuple[int, int, int],
        route: Route,
        bank: Bank | None,
    ):
        self._module, self._call, self._gate, self._router, self._place = module, call, gate, router, place
        self._route, self._bank = route, bank
        self._experts, self._element_bytes = anatomy.layers[place[0]].experts, anatomy.element_bytes
        self._own: OwnBank | None = None

    def forward(self, original: Callable[..., Any], hidden: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        experts, weights = chosen_experts((hidden, *args), kwargs)
        layer, number, count = self._place
        positions = self._call.positions_of(experts[..., 0].numel())
        given = (hidden, self._router.logits, experts, weights, self._gate, positions)
        routed = self._route(RouteState(*given, self._call.phase, layer, number, count))
        if routed is None and self._bank is None:
            self._call.work(layer, "experts", changed=0)
            return original(hidden, *args, **kwargs)
        changed = self._changed(experts, routed)
        routed = routed or Routed(experts, weights)
        bank = self._bank or self._own_bank()
        self._call.routed(layer, self._experts.num_experts, routed.experts, routed.weights)
        if self._bank is None:
            self._call.work(layer, "experts", changed=changed)
        else:
            self._call.work(layer, "experts", changed=len(experts), **costs(bank, routed.experts))
        return by_expert(bank, hidden, routed)

    def _changed(self, experts: torch.Tensor, routed: Routed | None) -> torch.Tensor | int:
        """How many tokens are given other experts than the model chose."""
        if routed is None:
            return 0
        count = self._experts.num_experts
        return (_given(experts, count) != _given(routed.experts, count)).any(-1).sum()

    def _own_bank(self) -> OwnBank:
        if self._own is None:
            self._own = OwnBank(self._module, self._experts, self._element_bytes)
        return self._own


def _given(experts: torch.Tensor, count: int) -> torch.Tensor:
    """`[T, E]` whether a token is given an expert."""
    marks = torch.zeros(len(experts), count + 1, dtype=torch.bool, device=experts.device)
    return marks.scatter_(-1, experts.clamp(max=count), True)[:, :count]


def costs(bank: Bank, experts: torch.Tensor) -> dict[str, torch.Tensor]:
    """FLOPs, fused bytes and weight bytes of giving tokens these experts `[T, k]`, as numbers still on the device."""
    count = len(bank.flops)
    tokens = torch.zeros(count + 1, dtype=torch.long, device=experts.device)
    tokens = tokens.scatter_add_(0, experts.flatten().clamp(max=count), torch.ones_like(experts.flatten()))[:count]
    flops, weights, activations = (tokens.new_tensor(each) for each in (bank.flops, bank.weight_bytes, bank.token_bytes))
    read = ((tokens > 0) * weights).sum()
    return {"flops": (tokens * flops).sum(), "bytes": read + (tokens * activations).sum(), "weight_bytes": read}
