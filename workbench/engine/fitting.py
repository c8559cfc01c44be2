"""Small networks fitted to modules of a model: what goes in and out of these over a text, and a training loop.

The model's weights get no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from workbench.probes.unobserved import unobserved

if TYPE_CHECKING:
    from workbench.engine.calibration import Document
    from workbench.models.load import LM


@torch.no_grad()
def inputs_and_outputs(lm: LM, modules: Sequence[nn.Module], tokens: Sequence[int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Hidden states `[T, d]` into and out of each module, in one plain forward call over a text; no profile sees it."""
    taken: dict[nn.Module, tuple[torch.Tensor, torch.Tensor]] = {}

    def take(module: nn.Module, args: tuple, kwargs: dict[str, Any], out: Any) -> None:
        output = out if isinstance(out, torch.Tensor) else out[0]
        taken[module] = (hidden_of(args, kwargs)[0].detach(), output[0].detach())

    handles = [module.register_forward_hook(take, with_kwargs=True) for module in modules]
    try:
        with unobserved():
            lm.model(input_ids=torch.tensor([list(tokens)], device=lm.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return [taken[module] for module in modules]


def counted(text: Document) -> list[int]:
    """The positions of a text whose next tokens count: those that recall a needle, or all if there is none."""
    return sorted({place for needle in text.needles for place in needle.asking}) or list(range(len(text.tokens) - 1))


def next_token_losses(logits: torch.Tensor, tokens: Sequence[int]) -> torch.Tensor:
    """`[T - 1]` nats: how unexpected each next token of a text was, by logits `[T, V]`."""
    return F.cross_entropy(logits[:-1], torch.tensor(list(tokens[1:]), device=logits.device), reduction="none")


def hidden_of(args: tuple, kwargs: dict[str, Any]) -> torch.Tensor:
    """The hidden states `[B, Q, d]` a module is called with."""
    return args[0] if args else kwargs["hidden_states"]


def fit(
    parameters: Sequence[torch.Tensor],
    loss: Callable[[torch.Tensor], torch.Tensor],
    num_rows: int,
    *,
    steps: int,
    batch: int,
    rate: float,
    seed: int = 0,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Adam on the mean loss of random rows, with a cosine decay of the rate; `loss` takes the rows' numbers `[n]`."""
    chosen = torch.Generator().manual_seed(seed)
    for parameter in parameters:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(parameters, lr=rate)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        rows = torch.randint(num_rows, (min(batch, num_rows),), generator=chosen).to(parameters[0].device)
        with torch.enable_grad():
            gradients = torch.autograd.grad(loss(rows), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        decay.step()
        on_step()
    for parameter in parameters:
        parameter.requires_grad_(False)
        parameter.grad = None
