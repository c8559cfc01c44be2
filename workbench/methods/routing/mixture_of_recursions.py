"""Mixture-of-Recursions: a shared layer that tokens go through as often as they need. Bae et al. 2025, arXiv 2507.10524."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from workbench.engine.calibration import Samples
from workbench.engine.call import Call
from workbench.methods.base import knob, register
from workbench.methods.routing.trained import TrainedBlock
from workbench.models.blocks.attach import Forward, llama_layers
from workbench.models.blocks.recursions import RecursionBlock
from workbench.models.blocks.training import Text, train

if TYPE_CHECKING:
    from workbench.models.load import LM


@register
@dataclass(frozen=True)
class MixtureOfRecursions(TrainedBlock):
    """Runs one shared layer in place of the middle ones, each time on fewer tokens, which alone are cached there."""

    name: ClassVar[str] = "mixture-of-recursions"
    paper: ClassVar[str] = "Bae et al. 2025, arXiv 2507.10524"
    deviations: ClassVar[tuple[str, ...]] = (
        "Made of a finished model and trained for minutes, where the paper trains from scratch: the shared layer starts as the "
        "mean of the middle ones; first and last layer and embeddings stay as they are.",
        "Prompts and appended turns keep the best tokens of each recursion among their own, which looks ahead, as the paper's "
        "code does. A decoded token is judged alone, by sigmoid(logit) >= 0.5, which the auxiliary loss trains; the code's "
        "top-k of one token would always go through everything. choice='threshold' judges prompts so, too.",
        "A recursion that keeps all tokens asks no router whether.",
    )

    choice: str = knob(
        "top-k", choices=("top-k", "threshold"), help="How tokens of prompts are chosen: the best of them, or each for itself."
    )

    def build(self, lm: LM) -> RecursionBlock:
        """The mean of the middle layers, and routers that know nothing."""
        return RecursionBlock(llama_layers(lm.model, self.name))

    def placed(self, block: RecursionBlock, lm: LM, call: Call | None) -> Mapping[nn.Module, Forward]:
        """In place of every middle layer."""
        return block.forwards(llama_layers(lm.model, self.name), call, by_rank=self.choice == "top-k")

    def learn(self, block: RecursionBlock, lm: LM, texts: list[Text], samples: Samples) -> None:
        """As any block, and its routers learn whom they would choose."""
        forwards = self.placed(block, lm, None)
        train(lm.model, block, forwards, texts, self.steps, samples.advance, extra=block.auxiliary_loss)
