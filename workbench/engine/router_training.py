"""Training of what informed routing needs: forecasters of modules, and routers that say which tokens to approximate.

Han et al. 2025, arXiv 2510.13831. First each forecaster is fitted to its module by smooth L1; then each router learns to tell
the tokens of smallest forecast error; then all routers are trained together on the next-token loss, with a hard Gumbel-softmax
whose gradient passes straight through, and a penalty that keeps the share executed at its target.
The model's weights get no gradient. Shapes: T tokens, d hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from workbench.engine.calibration import Document
from workbench.engine.fitting import counted, fit, hidden_of, next_token_losses
from workbench.engine.forecast import Network, errors
from workbench.engine.replacing import Replacement
from workbench.probes.unobserved import unobserved

if TYPE_CHECKING:
    from workbench.models.load import LM

FORECAST_STEPS, FORECAST_RATE = 400, 1e-2
WARM_STEPS, WARM_RATE = 150, 1e-2
ROUTER_STEPS, ROUTER_RATE = 600, 2e-3
BATCH = 512

BUDGET_WEIGHT = 8.0
"""Weight of the distance of the share executed from its target, as in the paper's code."""

HOTTEST, COLDEST = 5.0, 1.0
"""The temperature falls from the one to the other over the training."""

Pair = tuple[torch.Tensor, torch.Tensor]
"""What goes into a module and what comes out, `[T, d]` each."""


def fit_forecaster(seen: Pair, rank: int, seed: int, on_step: Callable[[], None]) -> Network:
    """A forecaster of a module, by smooth L1 over tokens and dimensions."""
    hidden, output = (each.float() for each in seen)
    size = hidden.shape[1]
    forecaster = Network.small((size, rank, output.shape[1]), F.silu, seed, hidden.device)
    fit(
        forecaster.parts,
        lambda rows: F.smooth_l1_loss(forecaster(hidden[rows]), output[rows]),
        len(hidden),
        steps=FORECAST_STEPS,
        batch=BATCH,
        rate=FORECAST_RATE,
        seed=seed,
        on_step=on_step,
    )
    return forecaster


def warm_router(seen: Pair, forecaster: Network, inside: int, share: float, seed: int, on_step: Callable[[], None]) -> Network:
    """A router that tells the `share` of tokens with the smallest forecast error: class 0 executes, class 1 approximates."""
    hidden, output = (each.float() for each in seen)
    off = errors(forecaster(hidden), output)
    labels = (off <= off.quantile(share)).long()
    router = Network.small((hidden.shape[1], inside, 2), F.relu, seed, hidden.device)
    fit(
        router.parts,
        lambda rows: F.cross_entropy(router(hidden[rows]), labels[rows]),
        len(hidden),
        steps=WARM_STEPS,
        batch=BATCH,
        rate=WARM_RATE,
        seed=seed,
        on_step=on_step,
    )
    return router


def train_routers(
    lm: LM,
    texts: Sequence[Document],
    modules: Sequence[nn.Module],
    forecasters: Sequence[Network],
    routers: Sequence[Network],
    share: float,
    on_step: Callable[[], None],
) -> None:
    """Trains routers, in place, so that a `share` of tokens and modules is approximated at the least next-token loss."""
    parts = [part.requires_grad_(True) for router in routers for part in router.parts]
    optimizer, chosen = torch.optim.AdamW(parts, lr=ROUTER_RATE, weight_decay=0.0), torch.Generator().manual_seed(0)
    for step in range(ROUTER_STEPS):
        heat = HOTTEST + (COLDEST - HOTTEST) * step / max(1, ROUTER_STEPS - 1)
        executed: list[torch.Tensor] = []
        text = texts[step % len(texts)]
        with torch.enable_grad():
            logits = _mixed(lm, text.tokens, modules, forecasters, routers, heat, chosen, executed)
            loss = next_token_losses(logits, text.tokens)[counted(text)].mean()
            loss = loss + BUDGET_WEIGHT * (1 - share - torch.stack(executed).mean()).abs()
            gradients = torch.autograd.grad(loss, parts)
        for part, gradient in zip(parts, gradients, strict=True):
            part.grad = gradient
        optimizer.step()
        on_step()
    for part in parts:
        part.requires_grad_(False)
        part.grad = None


def _mixed(
    lm: LM,
    tokens: Sequence[int],
    modules: Sequence[nn.Module],
    forecasters: Sequence[Network],
    routers: Sequence[Network],
    heat: float,
    chosen: torch.Generator,
    executed: list[torch.Tensor],
) -> torch.Tensor:
    """Logits `[T, V]` where each module gives `g output + (1 - g) forecast`, g 0 or 1 by noise; mean g go into `executed`."""

    def mixing(forecaster: Network, router: Network) -> Callable[..., Any]:
        def forward(original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            hidden, out = hidden_of(args, kwargs), original(*args, **kwargs)
            output = out if isinstance(out, torch.Tensor) else out[0]
            scores = router(hidden.float())
            noise = -(-torch.rand(scores.shape, generator=chosen).clamp(1e-9, 1 - 1e-7).log()).log()
            noise = noise.to(scores.device)  # Gumbel's
            soft = ((scores + noise) / heat).softmax(-1)
            hard = F.one_hot(soft.argmax(-1), 2).to(soft.dtype)
            gate = (hard - soft.detach() + soft)[..., :1]
            executed.append(gate.mean())
            mixed = (gate * output + (1 - gate) * forecaster(hidden.float())).to(output.dtype)
            return mixed if isinstance(out, torch.Tensor) else (mixed, *out[1:])

        return forward

    running = zip(modules, forecasters, routers, strict=True)
    replaced = Replacement({module: mixing(forecaster, router) for module, forecaster, router in running})
    replaced.attach()
    try:
        with unobserved():
            ids = torch.tensor([list(tokens)], device=lm.device)
            return lm.model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        replaced.detach()
