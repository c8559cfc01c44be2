"""Duo-LLM: a big and a small FFN in every layer, and a pattern of which of them, or neither, each layer runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import nn

from workbench.cost.ffn import resident_bytes
from workbench.engine.branches import BranchState, Skip, branch_forwards
from workbench.engine.calibration import Document, Samples
from workbench.engine.call import Call
from workbench.engine.ffn import Ffn, ffns
from workbench.engine.fitting import counted, fit, inputs_and_outputs, next_token_losses
from workbench.engine.replacing import Forward, logits_under
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.routing.base import FfnMethod, dense_layers
from workbench.models.anatomy import mlp_modules
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM

BIG, SMALL, SKIP = "b", "s", "-"
"""What a pattern says of a layer."""

STEPS, BATCH, RATE = 600, 512, 3e-3
LEAST_NEURONS = 8
MOST_PATTERNS = 64
"""More layers than give so many patterns are searched greedily."""


@register
@dataclass(frozen=True)
class DuoLLM(FfnMethod):
    """Runs a small FFN, fitted to the big one, or none at all in the layers where a pattern says so."""

    name: ClassVar[str] = "duo-llm"
    paper: ClassVar[str] = "Alizadeh et al. 2024, arXiv 2410.10846"
    calibrated_by: ClassVar[tuple[str, ...]] = ("ratio",)
    calibrated_on: ClassVar[str] = "recall and prose"
    sweep: ClassVar[tuple[Mapping[str, Any], ...]] = tuple({"big": big} for big in (3, 2, 1, 0))
    deviations: ClassVar[tuple[str, ...]] = (
        "The paper trains big and small FFNs together from scratch, every token choosing at random; here the model is as it is "
        "and each small FFN is fitted by mean square error to the big one's output on calibration text, from the big one's "
        "neurons of largest contribution. The paper finds such small FFNs clearly worse.",
        "The small FFN has the big one's activation and, if that has one, a gate; it has 1/16 of its neurons as in the paper, "
        "but at least 8.",
        "No router is trained: the same pattern holds for all tokens, given or the one of least loss on the calibration text "
        "among those with so many big layers (beyond 6 layers found greedily, one more big layer at a time). What an oracle or "
        "the best of random patterns would choose token by token is in workbench.experiments.patterns.",
        "'-' skips the FFN of a layer, not its attention.",
    )

    pattern: str = knob(
        "best", help="A letter a layer: b big, s small, - none, such as bsbs; or best: that of least loss at calibration."
    )
    big: int = knob(2, low=0, unit="layers", help="Layers that keep the big FFN, where the pattern is the best.")
    ratio: int = knob(16, low=1, high=1024, help="How many times fewer neurons the small FFN has; it has at least 8.")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.pattern != "best" and set(self.pattern) - {BIG, SMALL, SKIP}:
            raise UserError(
                f"Knob 'pattern' of {self.name!r} cannot be {self.pattern!r}; write b (big), s (small) or - (none) for each "
                "layer, or best."
            )

    @property
    def needs_calibration(self) -> bool:
        """Unless there is no small FFN in the pattern."""
        return self.pattern == "best" or SMALL in self.pattern

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self:
        """All big."""
        return cls(pattern=BIG * len(dense_layers(anatomy)))

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """Small FFNs by layer, and `best` `[L + 1, L]`: for each number of big layers, which are."""
        lm, big = samples.lm, ffns(samples.lm)
        layers, modules = list(big), mlp_modules(lm.model)
        seen = [inputs_and_outputs(lm, [modules[layer] for layer in layers], text.tokens) for text in samples.documents]
        done, total = itertools.count(1), STEPS * len(layers)
        tables: dict[str, torch.Tensor] = {}
        for number, layer in enumerate(layers):
            inputs, outputs = (torch.cat(each) for each in zip(*(text[number] for text in seen), strict=True))
            small = smaller(big[layer], inputs, max(LEAST_NEURONS, big[layer].neurons // self.ratio))
            fit(
                small.matrices,
                lambda rows, small=small, inputs=inputs, outputs=outputs: F.mse_loss(small(inputs[rows]), outputs[rows]),
                len(inputs),
                steps=STEPS,
                batch=BATCH,
                rate=RATE,
                on_step=lambda: samples.advance(next(done), total),
            )
            tables |= {f"{name}.{layer}": matrix for name, matrix in _named(small).items()}
        return {**tables, "best": self._best(lm, tables, samples.documents, len(layers))}

    def chosen(self, lm: LM) -> str:
        """The pattern. Raises UserError if it does not fit the model."""
        layers = list(mlp_modules(lm.model))
        if self.pattern != "best":
            if len(self.pattern) != len(layers):
                raise UserError(
                    f"The pattern {self.pattern!r} is of {len(self.pattern)} layers, and {lm.name} has {len(layers)} with a "
                    "dense FFN; write a letter for each."
                )
            return self.pattern
        if self.big > len(layers):
            raise UserError(f"big={self.big} is more than the {len(layers)} layers of {lm.name} with a dense FFN; give fewer.")
        return "".join(BIG if big else SMALL for big in self.tables["best"][self.big].tolist())

    def branches(self, lm: LM) -> dict[int, list[Ffn | Skip]]:
        """What each layer may run in place of its own FFN, and does where the pattern says so: the small one, or none."""
        big, none = ffns(lm), Skip()
        return {layer: [self._small(ffn, layer) if self.needs_calibration else none, none] for layer, ffn in big.items()}

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """Forwards of the FFNs; none where all are big."""
        pattern = self.chosen(lm)
        if set(pattern) <= {BIG}:
            return {}

        def choose(state: BranchState) -> torch.Tensor | None:
            number = (BIG, SMALL, SKIP).index(pattern[state.number])
            return torch.full(state.hidden.shape[:1], number, device=state.hidden.device) if number else None

        return branch_forwards(lm, call, choose, self.branches(lm))

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of the FFNs that the pattern runs, and of experts and all layers it does not rule."""
        big, pattern = ffns(lm), self.chosen(lm)
        held = {BIG: [0] * len(big), SMALL: [0] * len(big), SKIP: [-ffn.weight_bytes for ffn in big.values()]}
        if SMALL in pattern:
            smalls = (branches[0].weight_bytes for branches in self.branches(lm).values())
            held[SMALL] = [small - ffn.weight_bytes for small, ffn in zip(smalls, big.values(), strict=True)]
        return resident_bytes(lm.anatomy) + sum(held[letter][number] for number, letter in enumerate(pattern))

    def with_pattern(self, pattern: str) -> Self:
        """The same method and calibration with another pattern."""
        other = replace(self, pattern=pattern)
        return other if self.calibration is None else other.with_calibration(self.calibration)

    def _small(self, big: Ffn, layer: int) -> Ffn:
        names = ("gate", "up", "down") if big.gate is not None else ("up", "down")
        like = big.down[0]
        return replace(big, **{name: (self.tables[f"{name}.{layer}"].to(like.device, like.dtype), None) for name in names})

    def _best(self, lm: LM, tables: dict[str, torch.Tensor], texts: Sequence[Document], num_layers: int) -> torch.Tensor:
        trial = _Trial(self, tables)
        known: dict[str, float] = {}

        def loss(pattern: str) -> float:
            if pattern not in known:
                known[pattern] = sum(mean_loss(lm, trial.at(pattern), text) for text in texts)
            return known[pattern]

        if 2**num_layers <= MOST_PATTERNS:
            best = [min(patterns(num_layers, count), key=loss) for count in range(num_layers + 1)]
        else:
            best = [SMALL * num_layers]
            for _ in range(num_layers):
                now = best[-1]
                best.append(min((now[:at] + BIG + now[at + 1 :] for at in range(num_layers) if now[at] == SMALL), key=loss))
        return torch.tensor([[letter == BIG for letter in pattern] for pattern in best])


class _Trial:
    """The method with tables that are not a calibration yet."""

    def __init__(self, method: DuoLLM, tables: Mapping[str, torch.Tensor]):
        self._method, self._tables = method, tables

    def at(self, pattern: str) -> DuoLLM:
        other = replace(self._method, pattern=pattern)
        object.__setattr__(other, "calibration", self)
        return other

    @property
    def tables(self) -> Mapping[str, torch.Tensor]:
        return self._tables


def patterns(num_layers: int, big: int | None = None) -> list[str]:
    """All patterns of big and small layers, or the C(L, m) with so many big ones."""
    every = ("".join(letters) for letters in itertools.product(BIG + SMALL, repeat=num_layers))
    return [pattern for pattern in every if big is None or pattern.count(BIG) == big]


def mean_loss(lm: LM, method: DuoLLM, text: Document) -> float:
    """Mean next-token loss of a text under the method's pattern, nats, over the tokens that count."""
    return float(next_token_losses(logits_under(lm, method, text.tokens), text.tokens)[counted(text)].mean())


def smaller(big: Ffn, inputs: torch.Tensor, neurons: int) -> Ffn:
    """An FFN without biases of the neurons that contribute most: root mean square of what goes into `down`, times its column.

    `inputs` `[T, d]` are what goes into the big one.
    """
    contribution = big.inner(inputs).float().square().mean(0).sqrt() * big.down[0].float().norm(dim=0)
    chosen = big.only(contribution.topk(min(neurons, big.neurons)).indices.sort().values)
    return replace(chosen, **{name: (matrix.detach().float().clone(), None) for name, matrix in _named(chosen).items()})


def _named(ffn: Ffn) -> dict[str, torch.Tensor]:
    matrices = {"gate": ffn.gate, "up": ffn.up, "down": ffn.down}
    return {name: matrix[0] for name, matrix in matrices.items() if matrix is not None}
