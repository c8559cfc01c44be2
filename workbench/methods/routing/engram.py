"""Engram: hashed tables of n-grams, whose rows are added to the residual stream. Cheng et al. 2026, arXiv 2601.07372."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from workbench.engine.call import Call
from workbench.methods.base import register
from workbench.methods.routing.trained import TrainedBlock
from workbench.models.blocks.attach import Forward, llama_layers
from workbench.models.blocks.engram import LAYERS, EngramBlock, compressed

if TYPE_CHECKING:
    from workbench.models.load import LM


@register
@dataclass(frozen=True)
class Engram(TrainedBlock):
    """Looks the last two and three tokens up in hashed tables and adds what it finds before attention, as far as it fits."""

    name: ClassVar[str] = "engram"
    paper: ClassVar[str] = "Cheng et al. 2026, arXiv 2601.07372"
    deviations: ClassVar[tuple[str, ...]] = (
        "The model is not trained with it: a finished one stays as it is, and the tables, projections and gates alone are "
        "trained, for a few minutes.",
        "Tables are small: 8 heads an order of some 1,100 rows of 16 elements, before layers 1 and 2, where the demo has 8 "
        "of 646,000 rows of 64 before layers 1 and 15 of 30.",
        "There is one residual stream, so one gate. Value and key projections have no bias, and the value projection starts at "
        "zero, so that before training the model is as it was.",
        "Tokens run before a swap to it are like padding: nothing of them is remembered. Soft tokens (LookaheadKV's) have no "
        "ids, and nothing is added to them.",
    )

    def build(self, lm: LM) -> EngramBlock:
        """Empty memories before the layers."""
        texts = (lm.token_text(token) for token in range(lm.anatomy.vocab_size))
        layers = [layer for layer in LAYERS if layer < lm.anatomy.num_layers]
        return EngramBlock(layers, compressed(texts), lm.pad_token, lm.anatomy.hidden_size)

    def placed(self, block: EngramBlock, lm: LM, call: Call | None) -> Mapping[nn.Module, Forward]:
        """In place of the embedding, which tells the ids, and of the layers with a memory."""
        return block.forwards(lm.model.get_input_embeddings(), llama_layers(lm.model, self.name), call)
