"""How a block takes the place of parts of a model, and which models it fits."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from workbench.errors import UserError
from workbench.models.anatomy import decoder_layers

Forward = Callable[..., Any]
"""Called in place of a module's forward as `forward(original, *args, **kwargs)`, where `original` is the module's own."""

_PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
_PROJECTIONS = ("gate_proj", "up_proj", "down_proj")


class Progress(Protocol):
    """What a session's forward call tells a block, and what the block writes about it; None while a block is trained."""

    step: int
    phase: str
    positions: torch.Tensor | None
    has_padding: bool
    thinned: Any
    memory: dict[str, Any]

    def thin(self, passing: torch.Tensor) -> None:
        """From here on only some of the call's tokens are there."""
        ...

    def work(
        self,
        layer: int,
        component: str,
        *,
        changed: int,
        flops: int | None = None,
        bytes: int | None = None,
        weight_bytes: int | None = None,
    ) -> None:
        """What a component of a layer did in this call, and for how many tokens it was not what the model would have done."""
        ...

    def routed(self, layer: int, num_choices: int, experts: torch.Tensor, weights: torch.Tensor) -> None:
        """Which of so many choices each token took."""
        ...


@contextmanager
def attached(forwards: Mapping[nn.Module, Forward]) -> Iterator[None]:
    """Inside the block the forwards run in place of the modules' own; a session does the same for each of its calls."""
    replaced = []
    try:
        for module, forward in forwards.items():
            replaced.append((module, vars(module).get("forward")))
            module.forward = partial(forward, module.forward)
        yield
    finally:
        for module, before in reversed(replaced):
            del module.forward
            if before is not None:
                module.forward = before


def llama_layers(model: nn.Module, block: str) -> list[nn.Module]:
    """The decoder layers of a model made as Llama is. Raises UserError, naming the block, for another.

    Each layer is two pre-norms, attention and a gated MLP without biases, both added to the residual stream.
    """
    layers = decoder_layers(model)
    for index, layer in enumerate(layers):
        parts = {name for name, _ in layer.named_children()}
        projections = [getattr(getattr(layer, "mlp", None), name, None) for name in _PROJECTIONS]
        gated = all(isinstance(part, nn.Linear) and part.bias is None for part in projections)
        if parts != _PARTS or not gated:
            why = (
                f"its parts are {', '.join(sorted(parts))}" if parts != _PARTS else "its MLP is not a gated one without biases"
            )
            raise UserError(
                f"{block!r} takes the place of parts of Llama's layer, and layer {index} of {type(model).__name__} is another "
                f"({why}); use tiny-dense or another model of Llama's make."
            )
    return layers
