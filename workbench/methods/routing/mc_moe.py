"""MC-MoE: experts in mixed precision by an integer program, and second experts dropped where they weigh little.

Huang et al. 2024, arXiv 2410.06270, and its code (Aaronhuang-778/MC-MoE).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from workbench.engine.banks import banks_of
from workbench.engine.calibration import Samples
from workbench.engine.call import Call
from workbench.engine.experts import Bank, OwnBank, Routed, RouteState, expert_forwards
from workbench.engine.replacing import Forward
from workbench.engine.routed import routed
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.routing.base import ExpertMethod
from workbench.methods.routing.budgets import WIDTHS, bits_by_expert, least_bits
from workbench.methods.routing.quantised import Packed, PackedBank, PackedExpert, experts_of, rounded, signs
from workbench.models.anatomy import attention_modules
from workbench.trace.anatomy import Anatomy, Experts

if TYPE_CHECKING:
    from workbench.models.load import LM

NONE = 16.0
"""The number of bits that stands for no quantisation."""

_PROMPTS = ("prefill", "append")


@register
@dataclass(frozen=True)
class McMoE(ExpertMethod):
    """Holds experts in 1 to 3 bits, more where it matters, and gives a token its last expert only if that weighs enough.

    Bits follow from how often and how strongly an expert is called, and how far its output is off in few bits. The last
    expert of a token is left out if its weight is less than a share of the first one's, in the layers that bear it best; of a
    prompt the most important tokens keep all of theirs.
    """

    name: ClassVar[str] = "mc-moe"
    paper: ClassVar[str] = "Huang et al. 2024, arXiv 2410.06270"
    calibrated_by: ClassVar[tuple[str, ...]] = ("group",)
    tokenwise: ClassVar[bool] = False
    deviations: ClassVar[tuple[str, ...]] = (
        "Weights are rounded to nearest (1 bit: signs), without GPTQ's compensation, and attention keeps its precision (paper: "
        "4 bits).",
        "The cost of a width is frequency^alpha weight^beta error^gamma, as in the paper; the released solver raises the error "
        "to alpha. The program is solved by scipy's HiGHS in place of Gurobi, layer by layer over floor(bits E) bits.",
        "A token's importance is the attention it received, summed over heads and divided by the later queries that see it "
        "(itself included), times the 1-norm of what goes into the experts, as in the paper. The released code sums over keys, "
        "where every row is one, so it ranks by ||h|| / (T - i). An appended turn is ranked like a prompt.",
        "No token loses all its experts (tau_l = 0, the released default; more divides by zero there).",
        "Written for two experts a token. Where a model gives K, the last is tested against the first; the weights "
        "left are renormalised where the model's gate does so.",
        "Medians and pruning losses, hard-coded for Mixtral-8x7B in the released code, are measured: a layer's loss is what "
        "the negative log-likelihood of the calibration texts rises by if it alone is pruned.",
    )

    sweep: ClassVar[tuple[dict[str, float], ...]] = tuple({"bits": bits} for bits in (NONE, 3.0, 2.5, 2.0, 1.5))

    bits: float = knob(
        2.5, low=1.0, high=NONE, unit="bits", help="Mean bits a weight of an expert, up to 3; 16 leaves the weights alone."
    )
    pruning: bool = knob(True, help="Whether last experts that weigh little are left out.")
    protected: float = knob(
        0.02, low=0.0, high=1.0, help="Share of a prompt's tokens, the most important, that keep all experts."
    )
    layers: int = knob(10, low=0, unit="layers", help="Layers in which experts are left out: those where it harms least.")
    alpha: float = knob(1.0, low=0.0, help="Exponent of how often an expert is called, in the cost of its bits.")
    beta: float = knob(1.5, low=0.0, help="Exponent of the weight it is called with.")
    gamma: float = knob(2.0, low=0.0, help="Exponent of its error in few bits.")
    group: int = knob(128, low=8, high=4096, unit="weights", help="Weights that share a scale.")

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self:
        """No quantisation, and nothing left out."""
        return cls(bits=NONE, pruning=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(WIDTHS) < self.bits < NONE:
            raise UserError(
                f"Knob 'bits' of {self.name!r} cannot be {self.bits}; experts have {min(WIDTHS)} to {max(WIDTHS)} bits, or 16, "
                "which leaves them alone."
            )

    @property
    def needs_calibration(self) -> bool:
        """Unless it does nothing."""
        return self.bits < NONE or self.pruning

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError for a model without experts, or a mean of bits that some experts' least is above."""
        super().check(anatomy)
        for layer in anatomy.layers:
            count = layer.experts.num_experts if layer.experts is not None else 0
            if count and int(self.bits * count) < least_bits(count):
                raise UserError(
                    f"bits={self.bits} is too little for {count} experts, of which one has 3 bits and "
                    f"one has 2; give {least_bits(count) / count:g} or more."
                )

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """By layer with experts: `freq`, `weight` `[L, E]`, `errors` `[L, E, W]`, `ratio` `[L]` and `loss` `[L]`."""
        lm, texts = samples.lm, [document.tokens for document in samples.documents]
        modules = list(experts_of(lm.model, lm.anatomy))
        total = len(texts) * (1 + len(modules))
        tables = [_LayerTables(module, experts, lm, self.group) for _, module, experts in modules]
        dense = 0.0
        for done, tokens in enumerate(texts, 1):
            states, logits = routed(lm, tokens)
            dense += _nll(logits, tokens)
            for table, state in zip(tables, states.values(), strict=True):
                table.add(state)
            samples.advance(done, total)
        ratios, losses = [table.ratio() for table in tables], []
        for number, (layer, *_) in enumerate(modules):
            pruned = 0.0
            for done, tokens in enumerate(texts, 1):
                pruned += _nll(routed(lm, tokens, _pruning({layer: ratios[number]}))[1], tokens)
                samples.advance((1 + number) * len(texts) + done, total)
            losses.append((pruned - dense) / len(texts))
        stacked = {name: torch.stack([getattr(table, name) for table in tables]) for name in ("freq", "weight", "errors")}
        return {**stacked, "ratio": torch.tensor(ratios), "loss": torch.tensor(losses)}

    def widths(self) -> tuple[tuple[int, ...], ...]:
        """Bits of every expert, by layer with experts."""
        freq, weight, errors = (self.tables[name].double().numpy(force=True) for name in ("freq", "weight", "errors"))
        freq, weight = freq / freq.sum(-1, keepdims=True), weight / weight.sum(-1, keepdims=True)
        costs = freq[..., None] ** self.alpha * weight[..., None] ** self.beta * errors**self.gamma
        return tuple(tuple(bits_by_expert(of_layer, int(self.bits * len(of_layer)))) for of_layer in costs)

    def banks(self, lm: LM) -> Mapping[int, Bank]:
        """Experts in few bits."""
        if self.bits == NONE:
            return {}
        return banks_of(_Packing(self.group, self.widths()), lm)

    def pruned_layers(self, lm: LM) -> dict[int, float]:
        """The layers in which experts are left out, and the share of the first weight that the last must reach."""
        if not self.pruning:
            return {}
        layers = [layer for layer, *_ in experts_of(lm.model, lm.anatomy)]
        best = self.tables["loss"].argsort(stable=True)[: self.layers].tolist()
        return {layers[number]: float(self.tables["ratio"][number]) for number in best}

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """Forwards of routers and experts, and of attention where the importance of a prompt's tokens has to be seen."""
        ratios = self.pruned_layers(lm)
        received: dict[int, torch.Tensor] = {}

        def protected(state: RouteState) -> torch.Tensor | None:
            if state.phase not in _PROMPTS or self.protected == 0:
                return None
            window = lm.anatomy.layers[state.layer].attention.window
            return most_important(
                importance(state, received.pop(state.layer), call.seen, window), state.positions, self.protected
            )

        modules = attention_modules(lm.model)
        watched = {modules[layer]: _Watch(call, layer, received).forward for layer in ratios if self.protected > 0}
        banks = self.banks(lm)
        if not ratios and not banks:
            return {}
        return {**watched, **expert_forwards(lm, call, _pruning(ratios, protected), banks)}


def last_falls_short(weights: torch.Tensor, ratio: float) -> torch.Tensor:
    """`[T]` bool: whether the least of a token's weights `[T, K]` is below a share of its largest."""
    return weights.amin(-1) < ratio * weights.amax(-1)


def without_last(state: RouteState, leave_out: torch.Tensor) -> Routed:
    """The model's choice without the last expert of some tokens `[T]` bool, weighed anew as the model's gate does."""
    slot = state.weights.argmin(-1, keepdim=True)
    gone = torch.zeros_like(state.experts, dtype=torch.bool).scatter(-1, slot, leave_out[:, None])
    experts = state.experts.masked_fill(gone, state.num_experts)
    return Routed(experts, state.gate.weights(state.logits, experts).to(state.weights.dtype))


def importance(state: RouteState, mass: torch.Tensor, seen: list[int], window: int | None) -> torch.Tensor:
    """`[B, Q]`: attention a token received from each query that sees it, on average, times the 1-norm of its hidden state.

    `mass` `[B, S]` is what each position received from the call's queries; rows have `seen` so many tokens.
    """
    positions = state.positions.long()
    later = torch.tensor(seen, device=mass.device)[:, None] - positions
    received = mass.gather(1, positions.clamp(min=0)) / later.clamp(min=1, max=window)
    return received * state.hidden.float().abs().sum(-1).view(positions.shape)


def most_important(scores: torch.Tensor, positions: torch.Tensor, share: float) -> torch.Tensor:
    """`[B Q]` bool: this share of each row's tokens, rounded up; padding is none of them."""
    there = positions >= 0
    rank = scores.masked_fill(~there, -torch.inf).argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return (there & (rank < (share * there.sum(-1, keepdim=True)).ceil())).flatten()


def _pruning(ratios: Mapping[int, float], protected: Any = lambda state: None):
    """Leaves out last experts that fall short, in the layers given, but for tokens that are protected."""

    def route(state: RouteState) -> Routed | None:
        if state.layer not in ratios or state.experts.shape[-1] < 2:
            return None
        leave_out = last_falls_short(state.weights, ratios[state.layer])
        safe = protected(state)
        return without_last(state, leave_out if safe is None else leave_out & ~safe)

    return route


@dataclass(frozen=True)
class _Packing:
    """Experts at given widths, which methods that differ in what they leave out share."""

    group: int
    widths: tuple[tuple[int, ...], ...]
    calibration: ClassVar[None] = None

    def banks(self, lm: LM) -> dict[int, PackedBank]:
        """Packs them."""
        banks = {}
        for (layer, module, experts), widths in zip(experts_of(lm.model, lm.anatomy), self.widths, strict=True):
            packed = [packed_expert(module, expert, lm, bits, self.group) for expert, bits in enumerate(widths)]
            banks[layer] = PackedBank(module, experts, lm.anatomy.element_bytes, packed)
        return banks


class _Watch:
    """Lets an attention of a prompt say what each token received."""

    def __init__(self, call: Call, layer: int, received: dict[int, torch.Tensor]):
        self._call, self._layer, self._received = call, layer, received

    def forward(self, original: Any, *args: Any, **kwargs: Any) -> Any:
        """The attention's own forward."""
        self._call.received = {} if self._call.phase in _PROMPTS else None
        try:
            out = original(*args, **kwargs)
            self._received.update(self._call.received or {})
        finally:
            self._call.received = None
        return out


class _LayerTables:
    """What calibration texts say of one layer's experts."""

    def __init__(self, module: nn.Module, experts: Experts, lm: LM, group: int):
        num_experts = experts.num_experts
        self._own = OwnBank(module, experts, lm.anatomy.element_bytes)
        self._packed = [[packed_expert(module, expert, lm, bits, group) for bits in WIDTHS] for expert in range(num_experts)]
        self.freq, self.weight = torch.zeros(2, num_experts)
        self.errors = torch.zeros(num_experts, len(WIDTHS))
        self._ratios: list[torch.Tensor] = []

    def add(self, state: RouteState) -> None:
        """Counts one text: calls, their scores, and `||w (Y - Y_b)||` of each expert alone at each width."""
        scores = state.gate.scores(state.logits).gather(-1, state.experts)
        self._ratios.append((state.weights.amin(-1) / state.weights.amax(-1)).cpu())
        for expert in state.experts.unique().tolist():
            tokens, slots = (state.experts == expert).nonzero(as_tuple=True)
            self.freq[expert] += len(tokens)
            self.weight[expert] += scores[tokens, slots].sum().cpu()
            hidden, weights = state.hidden[tokens], state.weights[tokens, slots, None]
            own = self._own.compute(expert, hidden)
            for place, packed in enumerate(self._packed[expert]):
                self.errors[expert, place] += (weights * (own - packed.compute(hidden))).float().norm().cpu()

    def ratio(self) -> float:
        """The median of the last weight over the first."""
        return float(torch.cat(self._ratios).float().median())


def packed_expert(module: nn.Module, expert: int, lm: LM, bits: int, group: int) -> PackedExpert:
    """One expert rounded to so many bits; one bit is signs."""

    def quantise(matrix: torch.Tensor) -> tuple[Packed]:
        return (signs(matrix, group) if bits == 1 else rounded(matrix, bits, group),)

    return PackedExpert(module, expert, lm.anatomy.hidden_size, quantise)


def _nll(logits: torch.Tensor, tokens: tuple[int, ...]) -> float:
    return float(nn.functional.cross_entropy(logits[:-1].float(), torch.tensor(tokens[1:], device=logits.device)))
