"""What the blocks have in common that are trained in small for a model and then take the place of parts of it."""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from workbench.engine.calibration import Samples
from workbench.engine.call import Call
from workbench.errors import UserError
from workbench.methods.base import Method, knob
from workbench.models.blocks.attach import Forward, llama_layers
from workbench.models.blocks.training import Text, train
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM


@dataclass(frozen=True)
class TrainedBlock(Method):
    """A block whose weights are the method's calibration. A method says how it is made and where it is put."""

    slot: ClassVar[str] = "routing"
    calibrated_by: ClassVar[tuple[str, ...]] = ("steps",)
    trains: ClassVar[bool] = True

    steps: int = knob(400, low=1, high=1_000_000, unit="steps", help="Training steps of some 2,048 tokens.")

    def build(self, lm: LM) -> nn.Module:
        """The block as it is before training."""
        raise NotImplementedError

    def placed(self, block: nn.Module, lm: LM, call: Call | None) -> Mapping[nn.Module, Forward]:
        """What runs in place of which of the model's modules; without a call while it is trained or measured."""
        raise NotImplementedError

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError for a model with experts: the blocks are made for dense layers."""
        layer = next((layer for layer in anatomy.layers if layer.experts is not None), None)
        if layer is not None:
            raise UserError(
                f"{self.name!r} takes the place of parts of a dense layer, and layer {layer.index} of this "
                f"{anatomy.class_name} has experts; choose another method, or a dense model such as tiny-dense."
            )

    def forwards(self, lm: LM, call: Call | None) -> Mapping[nn.Module, Forward]:
        """The trained block in place of parts of the model."""
        return self.placed(self._block(lm), lm, call)

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """The block's trained weights, in half precision."""
        lm = samples.lm
        self.check(lm.anatomy)
        block = self._untrained(lm)
        texts = [
            Text(document.tokens, tuple(place + 1 for needle in document.needles for place in needle.asking))
            for document in samples.documents
        ]
        self.learn(block, lm, texts, samples)
        return {name: _half(tensor) for name, tensor in block.state_dict().items()}

    def learn(self, block: nn.Module, lm: LM, texts: list[Text], samples: Samples) -> None:
        """Trains the block on the texts."""
        train(lm.model, block, self.placed(block, lm, None), texts, self.steps, samples.advance)

    def _untrained(self, lm: LM) -> nn.Module:
        """The same first weights every time, whatever was drawn before, and without a trace in what is drawn later."""
        llama_layers(lm.model, self.name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return self.build(lm).to(lm.device)

    def _block(self, lm: LM) -> nn.Module:
        """The trained block, made once a model."""
        if lm.model not in self._made:
            block = self._untrained(lm)
            block.load_state_dict(dict(self.tables))
            weight = next(lm.model.parameters())
            self._made[lm.model] = block.to(weight.dtype).eval().requires_grad_(False)
        return self._made[lm.model]

    @cached_property
    def _made(self) -> weakref.WeakKeyDictionary[nn.Module, nn.Module]:
        return weakref.WeakKeyDictionary()


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
