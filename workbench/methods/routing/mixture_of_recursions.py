"""Mixture-of-Recursions: a shared layer that tokens go through as often as they need. Bae et al. 2025, arXiv 2507.10524."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Self

from torch import nn

from workbench.engine.calibration import Samples
from workbench.engine.call import Call
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.routing.trained import TrainedBlock
from workbench.models.blocks.attach import Forward, llama_layers
from workbench.models.blocks.recursions import RecursionBlock
from workbench.models.blocks.training import Text, train
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM


@register
@dataclass(frozen=True)
class MixtureOfRecursions(TrainedBlock):
    """Runs one shared layer in place of the middle ones, each time on fewer tokens, which alone are cached there."""

    name: ClassVar[str] = "mixture-of-recursions"
    paper: ClassVar[str] = "Bae et al. 2025, arXiv 2507.10524"
    tokenwise: ClassVar[bool] = False
    leaves_out: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "Made of a finished model and trained for minutes, where the paper trains from scratch: first and last layer start as "
        "the model's, the shared one as its second layer, whose two output projections are made 20 times as large, since the "
        "router's weight (0.1 sigmoid) makes what comes out as much smaller; embeddings and final norm stay as they are.",
        "Prompts and appended turns keep the best tokens of each recursion among their own, which looks ahead, as the paper's "
        "code does. A decoded token is judged alone, by sigmoid(logit) >= 0.5, which the auxiliary loss trains; the code's "
        "top-k of one token would always go through everything. choice='threshold' judges prompts so, too.",
        "The auxiliary loss weighs 1 in place of 0.001, with which minutes of training shut every router but the first, so "
        "that no decoded token would ever recurse.",
        "A recursion that keeps all tokens asks no router whether. The shared block is one layer, applied as often as there "
        "are middle layers.",
    )

    choice: str = knob(
        "top-k", choices=("top-k", "threshold"), help="How tokens of prompts are chosen: the best of them, or each for itself."
    )

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError for a model that has no middle layers to be shared, too."""
        super().check(anatomy)
        if anatomy.num_layers < 4:
            raise UserError(
                f"{self.name!r} shares the middle layers of a model of four or more, and {anatomy.class_name} has "
                f"{anatomy.num_layers}; choose another model, such as tiny-dense, or another method."
            )

    def build(self, lm: LM) -> RecursionBlock:
        """The model's first, second and last layer, and routers that know nothing."""
        return RecursionBlock(llama_layers(lm.model, self.name))

    def placed(self, block: RecursionBlock, lm: LM, call: Call | None) -> Mapping[nn.Module, Forward]:
        """In place of every middle layer."""
        return block.forwards(llama_layers(lm.model, self.name), call, by_rank=self.choice == "top-k")

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of the FFNs of the first and the last layer, of the one the middle layers share, and of the routers."""
        block = self._block(lm)
        parts = (block.first.mlp, block.shared.mlp, block.last.mlp, block.routers)
        return sum(weight.nbytes for part in parts for weight in part.parameters())

    def ways(self) -> tuple[Self, ...]:
        """By both choices."""
        return tuple(replace(self, choice=choice).with_calibration(self.calibration) for choice in ("top-k", "threshold"))

    def learn(self, block: RecursionBlock, lm: LM, texts: list[Text], samples: Samples) -> None:
        """As any block, and its routers learn whom they would choose."""
        forwards = self.placed(block, lm, None)
        train(lm.model, block, forwards, texts, self.steps, samples.advance, extra=block.auxiliary_loss)
