"""D2MoE: experts in nested bits, of which each token is given as many as it needs. arXiv 2504.15299."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import nn

from workbench.engine.banks import banks_of
from workbench.engine.calibration import Samples
from workbench.engine.call import Call
from workbench.engine.experts import OwnBank, RouteState, expert_forwards
from workbench.engine.replacing import Forward
from workbench.engine.routed import routed
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.routing.base import ExpertMethod
from workbench.methods.routing.quantised import PackedBank, PackedExpert, experts_of, nested
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM

BASE, LEVELS = 2, 3
"""Bits of the base, and how many widths there are: 2, 3 and 4 bits."""

NONE = 16.0
"""The number of bits that stands for no quantisation."""

_QUANTILES = 100
_RIDGE = 0.1
"""Share of the inputs' mean square that is added to the diagonal when a bit router is fitted."""


@register
@dataclass(frozen=True)
class D2MoE(ExpertMethod):
    """Holds experts in 2 bits and two planes of one bit more, and reads of each as many as its tokens ask for.

    A bit router gives each token a width in each of its experts. Low widths are the first planes of high ones, so an expert is
    read once, up to the highest width that is asked for.
    """

    name: ClassVar[str] = "d2moe"
    paper: ClassVar[str] = "D2MoE, 2025 (arXiv 2504.15299)"
    calibrated_by: ClassVar[tuple[str, ...]] = ("group",)
    deviations: ClassVar[tuple[str, ...]] = (
        "Weights are rounded to nearest, without GPTQ's compensation, and a plane's scale is the plain mean magnitude of what "
        "is left, not weighted by inputs.",
        "router=linear: one linear map an expert, fitted by ridge regression to the logarithm of its error in 2 bits, in place "
        "of a softmax over widths fine-tuned through the model. A token gets the more bits in an expert the larger that error "
        "times the gate weight; router=weight goes by the gate weight alone, router=oracle gives the smallest width whose "
        "relative error is below `error`, which takes the model's own weights: no technique, and its own cost is not counted.",
        "Thresholds are quantiles over the calibration texts: with t = (bits - 2) / 2 the widths get shares (1 - t)^2, "
        "2 t (1 - t) and t^2, of which `bits` is the mean; on other texts it may be another. No capacity drops a token.",
        "All planes stay in memory: no budget frees those of the layer before. In which order they load is simulated from the "
        "trace (`workbench.cost.load_order`).",
    )
    sweep: ClassVar[tuple[dict[str, float], ...]] = tuple({"bits": bits} for bits in (4.0, 3.0, 2.5, 2.0))

    bits: float = knob(
        3.0, low=2.0, high=NONE, unit="bits", help="Mean bits a token is given in an expert, 2 to 4; 16 leaves weights alone."
    )
    router: str = knob(
        "linear",
        choices=("linear", "weight", "oracle"),
        help="What tells a token's width: a fitted map, the gate, the true error.",
    )
    error: float = knob(
        0.2, low=0.0, help="Relative error of an expert's output that the oracle accepts; it has no use for `bits`."
    )
    group: int = knob(128, low=8, high=4096, unit="weights", help="Weights that share a scale.")

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self:
        """No quantisation."""
        return cls(bits=NONE)

    def __post_init__(self) -> None:
        super().__post_init__()
        most = BASE + LEVELS - 1
        if most < self.bits < NONE:
            raise UserError(
                f"Knob 'bits' of {self.name!r} cannot be {self.bits}; tokens are given {BASE} to {most} bits, or 16, which "
                "leaves the weights alone."
            )

    @property
    def needs_calibration(self) -> bool:
        """Unless the oracle decides, or there is nothing to decide."""
        return self.bits < NONE and self.router != "oracle"

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """`router` `[L, E, d + 1]`, and by layer quantiles `[L, Q + 1]` of what `router=linear` and `router=weight` go by."""
        lm = samples.lm
        texts = [document.tokens for document in samples.documents]
        seen: list[list[RouteState]] = []
        for done, tokens in enumerate(texts, 1):
            seen.append(list(routed(lm, tokens)[0].values()))
            samples.advance(done, len(texts))
        planes = banks_of(_Planes(self.group), lm)
        routers, by_error, by_weight = [], [], []
        for (layer, module, experts), states in zip(experts_of(lm.model, lm.anatomy), zip(*seen, strict=True), strict=True):
            own = OwnBank(module, experts, lm.anatomy.element_bytes)
            packed = planes[layer].experts
            routers.append(torch.stack([_fitted(own, packed, expert, states) for expert in range(experts.num_experts)]))
            by_error.append(_quantiles(torch.cat([expected_error(state, routers[-1]).flatten() for state in states])))
            by_weight.append(_quantiles(torch.cat([state.weights.flatten() for state in states])))
        return {"router": torch.stack(routers), "by_error": torch.stack(by_error), "by_weight": torch.stack(by_weight)}

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """Forwards of routers and experts."""
        if self.bits == NONE:
            return {}
        size, modules = lm.anatomy.element_bytes, experts_of(lm.model, lm.anatomy)
        own = {layer: OwnBank(module, experts, size) for layer, module, experts in modules}
        banks = {layer: NestedBank(own[layer], bank.experts) for layer, bank in self.banks(lm).items()}

        def route(state: RouteState) -> None:
            bank = banks[state.layer]
            levels = (
                oracle_levels(state, own[state.layer], bank.experts, self.error)
                if self.router == "oracle"
                else self.levels(state)
            )
            bank.ask(state.experts, levels)
            for expert, level, tokens, size in bank.planes():
                call.writer.add("planes", call.step, state.layer, expert, BASE + level - 1, tokens, size)
            flops, moved = self.decision_cost(state)
            if flops:
                call.work(state.layer, "method", changed=0, flops=flops, bytes=moved)

        return expert_forwards(lm, call, route, banks)

    @property
    def _share(self) -> float:
        """How likely a plane beyond the base is asked for."""
        return (self.bits - BASE) / (LEVELS - 1)

    def levels(self, state: RouteState) -> torch.Tensor:
        """`[T, K]` how many parts, the base and planes, each token is given of each of its experts: 1 to 3."""
        share = self._share
        if share in (0, 1):
            return torch.full_like(state.experts, 1 + int(share) * (LEVELS - 1))
        if self.router == "linear":
            scores, table = expected_error(state, self.tables["router"][state.number]), self.tables["by_error"]
        else:
            scores, table = state.weights, self.tables["by_weight"]
        bounds = [table[state.number, round(_QUANTILES * below)].item() for below in ((1 - share) ** 2, 1 - share**2)]
        return 1 + sum((scores > bound).long() for bound in bounds)

    def decision_cost(self, state: RouteState) -> tuple[int, int]:
        """The linear maps of the experts a token is given, where all do not get the same; the oracle's cost is not counted."""
        if self.router != "linear" or self._share in (0, 1):
            return 0, 0
        (tokens, width), pairs = state.hidden.shape, state.experts.numel()
        return 2 * pairs * width, state.hidden.element_size() * (tokens * width + state.num_experts * (width + 1))

    def banks(self, lm: LM) -> Mapping[int, PackedBank]:
        """All planes of all experts, as they are held."""
        return {} if self.bits == NONE else banks_of(_Planes(self.group), lm)


@dataclass(frozen=True)
class _Planes:
    """Experts in nested bits, which methods that differ in what tokens are given share."""

    group: int
    calibration: ClassVar[None] = None

    def banks(self, lm: LM) -> dict[int, PackedBank]:
        """Packs them."""
        banks = {}
        for layer, module, experts in experts_of(lm.model, lm.anatomy):
            packed = [
                PackedExpert(module, expert, lm.anatomy.hidden_size, lambda matrix: nested(matrix, BASE, LEVELS, self.group))
                for expert in range(experts.num_experts)
            ]
            banks[layer] = PackedBank(module, experts, lm.anatomy.element_bytes, packed)
        return banks


class NestedBank:
    """A layer's experts in nested bits, in one session: computed at the widths that were asked for, read up to the highest."""

    def __init__(self, own: OwnBank, experts: Sequence[PackedExpert]):
        self.experts = experts
        self.flops, self.token_bytes = own.flops, own.token_bytes
        self.weight_bytes = [0] * len(experts)
        self._asked: tuple[torch.Tensor, torch.Tensor] | None = None
        self._counts: list[list[int]] = []

    def ask(self, experts: torch.Tensor, levels: torch.Tensor) -> None:
        """What the tokens of the next call are given: experts `[T, K]`, and how many parts of each."""
        self._asked = experts, levels
        count = len(self.experts)
        given = experts.flatten() < count
        place = experts.flatten()[given] * LEVELS + levels.flatten()[given] - 1
        by_level = torch.bincount(place, minlength=count * LEVELS).view(count, LEVELS)
        self._counts = by_level.flip(-1).cumsum(-1).flip(-1).tolist()
        self.weight_bytes = [
            expert.nbytes(sum(map(bool, counts))) if counts[0] else 0
            for expert, counts in zip(self.experts, self._counts, strict=True)
        ]

    def planes(self) -> list[tuple[int, int, int, int]]:
        """Expert, level, tokens that asked for it or more, and its bytes, of every part that is read."""
        return [
            (number, level, tokens, expert.nbytes(level) - (expert.nbytes(level - 1) if level > 1 else 0))
            for number, (expert, counts) in enumerate(zip(self.experts, self._counts, strict=True))
            for level, tokens in enumerate(counts, 1)
            if tokens
        ]

    def compute(self, expert: int, hidden: torch.Tensor) -> torch.Tensor:
        """One expert's output, each token's at its width."""
        experts, levels = self._asked
        asked = levels[experts == expert]
        out = torch.empty_like(hidden)
        for level in asked.unique().tolist():
            of_level = asked == level
            out[of_level] = self.experts[expert].compute(hidden[of_level], level)
        return out


def expected_error(state: RouteState, router: torch.Tensor) -> torch.Tensor:
    """`[T, K]` logarithm of the error that each token's experts are expected to make in the base, gate weight included."""
    maps = router.to(state.hidden.device).float()[state.experts.clamp(max=len(router) - 1)]
    off = (maps[..., :-1] * state.hidden.float()[:, None]).sum(-1) + maps[..., -1]
    return off + state.weights.float().clamp(min=1e-9).log()


def oracle_levels(state: RouteState, own: OwnBank, experts: Sequence[PackedExpert], error: float) -> torch.Tensor:
    """`[T, K]` the fewest parts with which an expert's output is off by less than `error` of its norm, or all."""
    levels = torch.full_like(state.experts, LEVELS)
    for expert in state.experts.unique().tolist():
        if expert >= len(experts):
            continue
        chosen = state.experts == expert
        hidden = state.hidden[chosen.nonzero(as_tuple=True)[0]]
        exact = own.compute(expert, hidden)
        found = torch.full((len(hidden),), LEVELS, device=hidden.device)
        for level in range(LEVELS - 1, 0, -1):
            off = (experts[expert].compute(hidden, level) - exact).norm(dim=-1)
            found = torch.where(off < error * exact.norm(dim=-1), level, found)
        levels[chosen] = found
    return levels


def _fitted(own: OwnBank, packed: Sequence[PackedExpert], expert: int, states: Sequence[RouteState]) -> torch.Tensor:
    """`[d + 1]` half precision: the map from what goes into an expert to the logarithm of its error in the base."""
    hidden = torch.cat([state.hidden[(state.experts == expert).any(-1)] for state in states])
    width = hidden.shape[-1]
    if not len(hidden):
        return torch.zeros(width + 1, dtype=torch.float16)
    off = (packed[expert].compute(hidden, 1) - own.compute(expert, hidden)).float().norm(dim=-1).clamp(min=1e-9).log()
    inputs = hidden.float()
    centre, mean = inputs.mean(0), off.mean()
    inputs, off = inputs - centre, off - mean
    products = inputs.T @ inputs
    products.diagonal().add_(_RIDGE * products.diagonal().mean().clamp(min=1e-9))
    slope = torch.linalg.solve(products, inputs.T @ off)
    return torch.cat([slope, (mean - centre @ slope)[None]]).half().cpu()


def _quantiles(scores: torch.Tensor) -> torch.Tensor:
    """`[Q + 1]`; the first and last are without bound, since other texts may go beyond."""
    ranked = scores.float().sort().values.cpu()
    places = [min(round(each * len(ranked) / _QUANTILES), len(ranked) - 1) for each in range(_QUANTILES + 1)]
    found = ranked[places]
    found[0], found[-1] = -math.inf, math.inf
    return found
