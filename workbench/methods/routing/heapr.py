"""HEAPr: inner neurons of experts are removed, those first whose loss adds least to that of the model. Li et al. 2025."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch

from workbench.engine.calibration import Samples
from workbench.engine.experts import Bank, alone
from workbench.engine.graded import Graded, graded
from workbench.engine.neurons import Neurons, neurons
from workbench.engine.parts import PartsBank
from workbench.methods.base import knob, register
from workbench.methods.routing.base import ExpertMethod
from workbench.models.anatomy import expert_modules
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM

_UNSEEN = -1.0
"""Score of the neurons of an expert that no calibration token was given to: these go first."""


@register
@dataclass(frozen=True)
class HEAPr(ExpertMethod):
    """Removes the inner neurons of experts whose loss changes the model's least, ranked over all layers together.

    A neuron's score is `E[x^2] E[(g.w)^2]`: x what goes into the expert's down-projection, w the neuron's column of that, g the
    loss' gradient by its output. What stays is cut out of the weights, so experts differ in size and may be empty.
    """

    name: ClassVar[str] = "heapr"
    paper: ClassVar[str] = "Li et al. 2025, arXiv 2509.22299"
    calibrated_by: ClassVar[tuple[str, ...]] = ()
    deviations: ClassVar[tuple[str, ...]] = (
        "The matrix of mean outer products of gradients is never formed: the mean square of each gradient's product with a "
        "neuron's column is the same number, so one run forward and backward serves in place of two forward and one backward.",
        "Texts are half prose, half recall documents of which only the answers count in the loss, one at a time; the paper has "
        "batches of WikiText. Of a model in half precision gradients are in half precision, their sums in float32.",
        "An expert left without neurons is still chosen, and gives its output bias, or nothing.",
    )

    sweep: ClassVar[tuple[Mapping[str, Any], ...]] = tuple({"ratio": ratio} for ratio in (0.2, 0.4, 0.6, 0.8))
    calibrated_on: ClassVar[str] = "recall and prose"

    ratio: float = knob(0.2, low=0.0, high=1.0, help="Share of all experts' inner neurons that is removed.")

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self:
        """Nothing is removed."""
        return cls(ratio=0.0)

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """`scores` `[L, E, f]` of every inner neuron of the layers with experts, -1 in an expert that no token was given to."""
        layouts = {layer: neurons(module) for layer, module in expert_modules(samples.lm.model).items()}
        sums: dict[int, torch.Tensor] = {}
        for done, document in enumerate(samples.documents, 1):
            for each in graded(samples.lm, document):
                found = _sums(layouts[each.layer], each)
                sums[each.layer] = sums[each.layer] + found if each.layer in sums else found
            samples.advance(done, len(samples.documents))
        return {"scores": torch.stack([_scores(sums[layer]) for layer in sorted(sums)])}

    def kept(self) -> torch.Tensor:
        """`[L, E, f]` which neurons stay: all but the lowest `ratio`, over all layers; of equal scores the last go first."""
        scores = self.tables["scores"]
        stay = scores.numel() - round(self.ratio * scores.numel())
        best = scores.flatten().argsort(descending=True, stable=True)[:stay]
        return torch.zeros(scores.numel(), dtype=torch.bool).index_fill(0, best, True).view(scores.shape)

    def banks(self, lm: LM) -> Mapping[int, Bank]:
        """Experts with the neurons that stay, in layers that lose some."""
        modules = expert_modules(lm.model)
        pairs = zip(modules.items(), self.kept(), strict=True)
        return {layer: _cut(neurons(module), kept) for (layer, module), kept in pairs if not kept.all()}


def _cut(layout: Neurons, kept: torch.Tensor) -> PartsBank:
    """Experts of which the neurons of `kept` `[E, f]` stay."""
    parts = []
    for expert, stays in enumerate(kept.to(layout.module.down_proj.device)):
        if not stays.any():
            parts.append(layout.constant(expert))
            continue
        weights = {} if stays.all() else layout.keep(expert, stays.nonzero().flatten())
        parts.append(alone(layout.module, expert, **weights))
    return PartsBank(parts)


@torch.no_grad()
def _sums(layout: Neurons, text: Graded) -> torch.Tensor:
    """`[E, 2 f + 1]` float32 sums over a text's tokens of each expert: `x^2` and `(g.w)^2` of each neuron, and how many."""
    rows = []
    for expert in range(len(layout.module.down_proj)):
        hidden, gradient = text.of(expert)
        inner, pushed = layout.inner(expert, hidden).float(), gradient @ layout.columns(expert).float()
        rows.append(torch.cat([inner.square().sum(0), pushed.square().sum(0), inner.new_tensor([len(hidden)])]))
    return torch.stack(rows).cpu()


def _scores(sums: torch.Tensor) -> torch.Tensor:
    """`[E, f]` the product of the two means."""
    squares, pushes = sums[:, :-1].chunk(2, -1)
    count = sums[:, -1:]
    return torch.where(count > 0, squares * pushes / count.clamp(min=1) ** 2, _UNSEEN)
