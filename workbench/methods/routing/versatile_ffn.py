"""VersatileFFN: one FFN as eight narrow experts and as a loop. Nie et al. 2025, arXiv 2512.14531."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from workbench.engine.calibration import Samples
from workbench.engine.call import Call
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.routing.trained import TrainedBlock
from workbench.models.blocks.attach import Forward, llama_layers
from workbench.models.blocks.training import Text, train
from workbench.models.blocks.versatile_ffn import SLICES, VersatileBlock
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM


@register
@dataclass(frozen=True)
class VersatileFFN(TrainedBlock):
    """Sends easy tokens through two of eight slices of the FFN and lets hard ones pass through all of it up to four times."""

    name: ClassVar[str] = "versatile-ffn"
    paper: ClassVar[str] = "Nie et al. 2025, arXiv 2512.14531"
    deviations: ClassVar[tuple[str, ...]] = (
        "Of a finished model the FFNs and the gates on them are trained further, for minutes; attention, norms and embeddings "
        "stay. The paper trains the whole model on 40 billion tokens.",
        "The temperature of the Gumbel softmax falls from 5 to 0.1 over the steps there are, in place of by 0.99984 a step.",
        "loops='ragged' computes a pass for the tokens that take it alone; the released code, as loops='dense', for all tokens "
        "as often as the hardest of them needs. What comes out is the same.",
        "The norm before each further pass is computed and is not in the bytes.",
    )

    loops: str = knob(
        "ragged",
        choices=("ragged", "dense"),
        help="Whether a pass is computed for the tokens that take it, or for all of them.",
    )

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError for a model whose FFNs cannot be cut into equal slices, too."""
        super().check(anatomy)
        for layer in anatomy.layers:
            inner = next(linear.in_features for linear in layer.linears[::-1] if linear.component == "mlp")
            if inner % SLICES:
                raise UserError(
                    f"{self.name!r} cuts an FFN into {SLICES} equal slices, which the {inner} neurons of layer {layer.index} "
                    f"of {anatomy.class_name} are not; choose another model, such as tiny-dense, or another method."
                )

    def build(self, lm: LM) -> VersatileBlock:
        """The model's own FFNs, and gates that know nothing."""
        return VersatileBlock(llama_layers(lm.model, self.name))

    def placed(self, block: VersatileBlock, lm: LM, call: Call | None) -> Mapping[nn.Module, Forward]:
        """In place of every FFN, and of the norm before it, which tells the residual stream."""
        return block.forwards(llama_layers(lm.model, self.name), call, ragged=self.loops == "ragged")

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of the FFNs, which are the block's own, and of their gates."""
        return sum(weight.nbytes for weight in self._block(lm).parameters())

    def learn(self, block: VersatileBlock, lm: LM, texts: list[Text], samples: Samples) -> None:
        """As any block, at a falling temperature."""
        train(lm.model, block, self.placed(block, lm, None), texts, self.steps, samples.advance, before=block.cool)
