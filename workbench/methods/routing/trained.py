"""What the blocks have in common that are trained in small for a model and then take the place of parts of it."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Self

import torch
from torch import nn

from workbench.cost.ffn import resident_bytes
from workbench.engine.calibration import Samples
from workbench.engine.call import Call
from workbench.errors import UserError
from workbench.methods.base import knob
from workbench.methods.routing.base import RoutingMethod
from workbench.models.blocks.attach import Forward, llama_layers
from workbench.models.blocks.training import Text, train
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM


@dataclass(frozen=True)
class TrainedBlock(RoutingMethod):
    """A block whose weights are the method's calibration. A method says how it is made and where it is put."""

    calibrated_by: ClassVar[tuple[str, ...]] = ("steps",)
    calibrated_on: ClassVar[str] = "recall and prose"

    steps: int = knob(300, low=1, high=1_000_000, unit="steps", help="Training steps of some 2,048 tokens.")

    def build(self, lm: LM) -> nn.Module:
        """The block as it is before training."""
        raise TypeError(f"{type(self).__name__} must say what it trains: define build(lm).")

    def placed(self, block: nn.Module, lm: LM, call: Call | None) -> Mapping[nn.Module, Forward]:
        """What runs in place of which of the model's modules; without a call while it is trained or measured."""
        raise TypeError(f"{type(self).__name__} must say where its block is put: define placed(block, lm, call).")

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError for a model whose layers are not Llama's: two norms, attention and a gated FFN without experts."""
        for layer in anatomy.layers:
            num_ffn = sum(linear.component == "mlp" for linear in layer.linears)
            if layer.experts is not None or len(layer.norms) != 2 or num_ffn != 3:
                has = "experts" if layer.experts is not None else f"{len(layer.norms)} norms and {num_ffn} matrices in its FFN"
                raise UserError(
                    f"{self.name!r} takes the place of parts of a layer of two norms, attention and a gated FFN, and layer "
                    f"{layer.index} of {anatomy.class_name} has {has}; choose another method, or a model such as tiny-dense."
                )

    def forwards(self, lm: LM, call: Call | None) -> Mapping[nn.Module, Forward]:
        """The trained block in place of parts of the model."""
        return self.placed(self._block(lm), lm, call)

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of the model's FFNs and of what comes beside them."""
        return resident_bytes(lm.anatomy) + sum(weight.nbytes for weight in self._block(lm).parameters())

    def ways(self) -> tuple[Self, ...]:
        """The ways in which what was trained may be run, as far as they answer differently."""
        return (self,)

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """The block's trained weights, in half precision. Raises UserError if there is nothing to learn from."""
        lm = samples.lm
        self.check(lm.anatomy)
        block = self.untrained(lm)
        texts = [
            Text(document.tokens, tuple(place + 1 for needle in document.needles for place in needle.asking))
            for document in samples.documents
            if len(document.tokens) > 1
        ]
        if not texts:
            raise UserError(f"{self.name!r} learns to predict next tokens, and no text has two; give longer documents.")
        with _drawing_alike(lm):
            self.learn(block, lm, texts, samples)
        return {name: _half(tensor) for name, tensor in block.state_dict().items()}

    def learn(self, block: nn.Module, lm: LM, texts: list[Text], samples: Samples) -> None:
        """Trains the block on the texts."""
        train(lm.model, block, self.placed(block, lm, None), texts, self.steps, samples.advance)

    def untrained(self, lm: LM) -> nn.Module:
        """The block as training begins with it, the same every time."""
        llama_layers(lm.model, self.name)
        with _drawing_alike(lm):
            return self.build(lm).to(lm.device)

    def _block(self, lm: LM) -> nn.Module:
        """The trained block, made once a model."""
        if lm.model not in self._made:
            block = self.untrained(lm)
            block.load_state_dict(dict(self.tables))
            weight = next(lm.model.parameters())
            self._made[lm.model] = block.to(weight.dtype).eval().requires_grad_(False)
        return self._made[lm.model]

    @cached_property
    def _made(self) -> weakref.WeakKeyDictionary[nn.Module, nn.Module]:
        return weakref.WeakKeyDictionary()


@contextmanager
def _drawing_alike(lm: LM) -> Iterator[None]:
    """Inside the block the same is drawn every time, and what is drawn after it is as if there had been none."""
    with torch.random.fork_rng(devices=[lm.device] if lm.device.type == "cuda" else []):
        torch.manual_seed(0)
        yield


def _half(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.half() if tensor.is_floating_point() else tensor
