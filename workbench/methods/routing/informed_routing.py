"""Informed routing: attention and FFN of every layer run for some tokens and are forecast for others."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from workbench.cost.ffn import resident_bytes
from workbench.engine import router_training as training
from workbench.engine.branches import BranchState, branch_forwards
from workbench.engine.calibration import Samples
from workbench.engine.call import Call
from workbench.engine.fitting import inputs_and_outputs
from workbench.engine.forecast import Choose, Judge, Network, attention_forwards, errors
from workbench.engine.replacing import Forward
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.routing.base import FfnMethod
from workbench.models.anatomy import attention_modules, mlp_modules, output_projections
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM

TRAINED_AT = 0.25
"""The share approximated that routers are trained for: the paper's scripts'."""

ATTENTION, MLP = "attention", "mlp"
_QUANTILES = 201


@register
@dataclass(frozen=True)
class InformedRouting(FfnMethod):
    """Runs attention and FFN for the tokens a router sends there; what they would give the others a small network forecasts."""

    name: ClassVar[str] = "informed-routing"
    paper: ClassVar[str] = "Han et al. 2025, arXiv 2510.13831"
    calibrated_by: ClassVar[tuple[str, ...]] = ("rank",)
    calibrated_on: ClassVar[str] = "recall and prose"
    sweep: ClassVar[tuple[Mapping[str, Any], ...]] = tuple({"sparsity": share} for share in (0.1, 0.25, 0.5, 0.75))
    deviations: ClassVar[tuple[str, ...]] = (
        "The forecaster's rank is at most a quarter of the hidden size: the paper's 100 would cost a tiny model more than it "
        "saves. The router's inner size is max(8, d/4); the code's d/4 - 200 is nothing for small models.",
        "Training in small, on 8 texts of some 512 tokens: 400 steps for each forecaster at 1e-2 with a cosine decay, 150 for "
        "each router's warm start, 600 for all routers together, one text a step, without the regulariser of weight 0.1 on "
        "what skipped tokens would have changed, and without LoRA afterwards.",
        "A router's choice is its argmax, moved so that on the calibration texts the share asked for is approximated, over all "
        "modules together; the paper's code draws Gumbel noise at inference too, so that its routing is random. Routers are "
        "trained for a quarter, whatever share is asked for.",
        "Routers and forecasters read the normed hidden state that goes into the module.",
        "K and V of every token are computed, as others attend to it. Of an approximated token the FFN, the output projection "
        "and, where it is a module of its own, the query projection are left out; its scores are still computed, for a query "
        "of zeros, which is also what a cache method that looks at queries sees.",
        "mode=oracle approximates the tokens of a call with the smallest true error (of a single token, if it is below what so "
        "many were at calibration). It runs every module to see that, and its figures are those of a method that knew.",
    )

    sparsity: float = knob(
        TRAINED_AT, low=0.0, high=0.95, help="Share of tokens and modules to approximate, over attention and FFN of all layers."
    )
    mode: str = knob("router", choices=("router", "oracle"), help="Whether trained routers choose, or the true error does.")
    rank: int = knob(100, low=1, high=4096, help="Inner size of the forecasters, at most a quarter of the model's hidden size.")

    @property
    def needs_calibration(self) -> bool:
        """Unless nothing is approximated."""
        return self.sparsity > 0

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self:
        """Nothing approximated."""
        return cls(sparsity=0.0)

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """Forecasters and routers by module, and quantiles of routers' scores over all and of true errors by module."""
        lm = samples.lm
        modules, size = _modules(lm), lm.anatomy.hidden_size
        total = len(modules) * (training.FORECAST_STEPS + training.WARM_STEPS) + training.ROUTER_STEPS
        done = itertools.count(1)

        def step() -> None:
            samples.advance(next(done), total)

        texts = [inputs_and_outputs(lm, list(modules.values()), text.tokens) for text in samples.documents]
        _check_outputs(lm, samples.documents[0].tokens)
        seen = [
            (torch.cat(inputs), torch.cat(outputs))
            for inputs, outputs in (zip(*each, strict=True) for each in zip(*texts, strict=True))
        ]
        rank = min(self.rank, max(1, size // 4))
        forecasters = [training.fit_forecaster(pair, rank, seed, step) for seed, pair in enumerate(seen)]
        routers = [
            training.warm_router(pair, forecaster, max(8, size // 4), TRAINED_AT, seed, step)
            for seed, (pair, forecaster) in enumerate(zip(seen, forecasters, strict=True))
        ]
        training.train_routers(lm, samples.documents, list(modules.values()), forecasters, routers, TRAINED_AT, step)
        shares = torch.linspace(0, 1, _QUANTILES, device=lm.device)
        margins = torch.cat([_margin(router, hidden) for router, (hidden, _) in zip(routers, seen, strict=True)])
        off = [errors(forecaster(hidden.float()), out) for forecaster, (hidden, out) in zip(forecasters, seen, strict=True)]
        tables = {"margins": margins.quantile(shares), "errors": torch.stack([each.quantile(shares) for each in off])}
        for name, forecaster, router in zip(modules, forecasters, routers, strict=True):
            tables |= forecaster.tables(f"{name}.forecaster") | router.tables(f"{name}.router")
        return tables

    def forecaster(self, lm: LM, module: str) -> Network:
        """The forecaster of a module such as `mlp.0`."""
        return Network.of(self.tables, f"{module}.forecaster", F.silu, next(lm.model.parameters()))

    def router(self, lm: LM, module: str) -> Network:
        """Its router."""
        return Network.of(self.tables, f"{module}.router", F.relu, next(lm.model.parameters()))

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """Forwards of attention and FFN; none where nothing is approximated."""
        if not self.sparsity:
            return {}
        names, oracle = list(_modules(lm)), self.mode == "oracle"
        forwards: dict[nn.Module, Forward] = {}
        for layer in (int(name.partition(".")[2]) for name in names if name.startswith(ATTENTION)):
            name = f"{ATTENTION}.{layer}"
            router = None if oracle else self._chooses(lm, call, name)
            judge = self._judges(names.index(name)) if oracle else None
            forwards |= attention_forwards(lm, call, layer, self.forecaster(lm, name), router, judge)
        layers = [int(name.partition(".")[2]) for name in names if name.startswith(MLP)]
        branches = {layer: [self.forecaster(lm, f"{MLP}.{layer}")] for layer in layers}
        choosing = {layer: self._chooses(lm, call, f"{MLP}.{layer}") for layer in layers}
        judging = {layer: self._judges(names.index(f"{MLP}.{layer}")) for layer in layers}

        def choose(state: BranchState) -> torch.Tensor:
            if oracle:
                (forecaster,) = branches[state.layer]
                return judging[state.layer](errors(forecaster(state.hidden), state.own(state.hidden))).long()
            return choosing[state.layer](state.hidden).long()

        return {**forwards, **branch_forwards(lm, call, choose, branches)}

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of all FFNs, and of forecasters and routers."""
        if not self.sparsity:
            return resident_bytes(lm.anatomy)
        networks = [make(lm, name) for name in _modules(lm) for make in (self.forecaster, self.router)]
        return resident_bytes(lm.anatomy) + sum(network.weight_bytes for network in networks)

    def _chooses(self, lm: LM, call: Call, module: str) -> Choose:
        router, layer = self.router(lm, module), int(module.partition(".")[2])
        above = _at(self.tables["margins"], 1 - self.sparsity)

        def choose(hidden: torch.Tensor) -> torch.Tensor:
            count = len(hidden)
            moved = router.weight_bytes + router.bias_bytes + count * router.token_bytes
            call.work(layer, "method", changed=0, flops=count * router.flops, bytes=moved, weight_bytes=router.weight_bytes)
            return _margin(router, hidden) > above

        return choose

    def _judges(self, number: int) -> Judge:
        below = _at(self.tables["errors"][number], self.sparsity)

        def judge(off: torch.Tensor) -> torch.Tensor:
            if len(off) == 1:
                return off <= below
            approximated = torch.zeros_like(off, dtype=torch.bool)
            approximated[off.argsort(stable=True)[: round(self.sparsity * len(off))]] = True
            return approximated

        return judge


def _modules(lm: LM) -> dict[str, nn.Module]:
    """Attention and FFN of every layer that has a dense one."""
    mlps, attention = mlp_modules(lm.model), attention_modules(lm.model)
    named: dict[str, nn.Module] = {f"{ATTENTION}.{layer}": attention[layer] for layer in mlps}
    return named | {f"{MLP}.{layer}": module for layer, module in mlps.items()}


def _check_outputs(lm: LM, tokens: Any) -> None:
    """Raises UserError if attention does anything after its output projection, which a forecast stands in for."""
    pairs = [
        (attention_modules(lm.model)[layer], output_projections(lm.model)[layer], layer) for layer in mlp_modules(lm.model)
    ]
    for attention, out, layer in pairs:
        if out is not None:
            (_, given), (_, projected) = inputs_and_outputs(lm, [attention, out], tokens)
        if out is None or not torch.equal(given, projected):
            raise UserError(
                f"The attention of layer {layer} of {lm.name} does not end with an output projection that was found; choose "
                "another method."
            )


def _margin(router: Network, hidden: torch.Tensor) -> torch.Tensor:
    """`[T]` how much rather a router approximates."""
    scores = router(hidden.to(router.first.dtype)).float()
    return scores[..., 1] - scores[..., 0]


def _at(quantiles: torch.Tensor, share: float) -> float:
    """The value below which a share lies."""
    return float(quantiles.float().cpu().quantile(share))
