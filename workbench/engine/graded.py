"""How the loss of a text depends on what a model's experts give back.

Shapes: T tokens, K experts a token, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from workbench.engine.calibration import Document
from workbench.models.anatomy import expert_modules
from workbench.probes.moe import chosen_experts
from workbench.probes.unobserved import unobserved

if TYPE_CHECKING:
    from workbench.models.load import LM


@dataclass(frozen=True)
class Graded:
    """One layer's experts along one text."""

    layer: int
    hidden: torch.Tensor
    """`[T, d]` what goes into them."""
    experts: torch.Tensor
    """`[T, K]`."""
    weights: torch.Tensor
    """`[T, K]`."""
    gradient: torch.Tensor
    """`[T, d]` of the loss by what a token's experts give back together, each times its weight."""

    def of(self, expert: int) -> tuple[torch.Tensor, torch.Tensor]:
        """What goes into one expert `[n, d]`, and the gradient by what it gives back, not weighted yet: `[n, d]` float32."""
        tokens, slots = (self.experts == expert).nonzero(as_tuple=True)
        return self.hidden[tokens], self.gradient[tokens].float() * self.weights[tokens, slots, None].float()


def graded(lm: LM, document: Document) -> list[Graded]:
    """Every layer with experts along a text, run forward and backward; no weight of the model gets a gradient.

    The loss is the mean negative log-likelihood of the text's tokens; of one that repeats passages, of the repeated alone.
    """
    leaves: dict[int, torch.Tensor] = {}
    ids = torch.tensor([document.tokens], device=lm.device)
    counted = sorted({place for needle in document.needles for place in needle.asking}) or slice(None)
    with torch.enable_grad(), unobserved(), _listening(lm.model, leaves) as given:
        logits = lm.model(input_ids=ids, use_cache=False).logits[0, :-1][counted]
        loss = F.cross_entropy(logits.float(), ids[0, 1:][counted])
        gradients = torch.autograd.grad(loss, list(leaves.values()))
    by_layer = dict(zip(leaves, gradients, strict=True))
    return [Graded(layer, *each, by_layer[layer].flatten(0, -2)) for layer, each in given.items()]


@contextmanager
def _listening(model: nn.Module, leaves: dict[int, torch.Tensor]) -> Iterator[dict[int, list[torch.Tensor]]]:
    """Collects what experts are given, and adds to what they give back a zero by which gradients can be taken."""
    given: dict[int, list[torch.Tensor]] = {}
    handles = []
    for layer, module in expert_modules(model).items():
        handles.append(module.register_forward_pre_hook(_note(given, layer), with_kwargs=True))
        handles.append(module.register_forward_hook(_leaf(leaves, layer)))
    try:
        yield given
    finally:
        for handle in handles:
            handle.remove()


def _note(given: dict[int, list[torch.Tensor]], layer: int) -> Callable[..., None]:
    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        experts, weights = chosen_experts(args, kwargs)
        hidden = args[0] if args else next(iter(kwargs.values()))
        given[layer] = [each.detach().flatten(0, -2) for each in (hidden, experts, weights)]

    return hook


def _leaf(leaves: dict[int, torch.Tensor], layer: int) -> Callable[..., torch.Tensor]:
    def hook(_: nn.Module, __: tuple, out: torch.Tensor) -> torch.Tensor:
        leaves[layer] = torch.zeros_like(out, requires_grad=True)
        return out + leaves[layer]

    return hook
