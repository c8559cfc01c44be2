"""A text run through a model once, and what each layer with experts was asked to compute: what routing methods calibrate on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from workbench.engine.call import Call
from workbench.engine.experts import Route, Routed, RouteState, expert_forwards
from workbench.engine.replacing import Replacement
from workbench.probes.unobserved import unobserved
from workbench.trace.store import TraceWriter

if TYPE_CHECKING:
    from workbench.models.load import LM


@torch.no_grad()
def routed(lm: LM, tokens: Sequence[int], route: Route | None = None) -> tuple[dict[int, RouteState], torch.Tensor]:
    """What every layer's experts were called with, and the logits `[T, V]`, for a text of T tokens in one call.

    With `route`, tokens are given what it says; the states are those the model would have routed.
    """
    ids = torch.tensor([list(tokens)], device=lm.device)
    call = Call(TraceWriter({}), positions=torch.arange(ids.shape[1], dtype=torch.int32, device=lm.device)[None])
    states: dict[int, RouteState] = {}

    def see(state: RouteState) -> Routed | None:
        states[state.layer] = state
        return route(state) if route is not None else None

    replaced = Replacement(expert_forwards(lm, call, see, {}))
    with unobserved():
        try:
            replaced.attach()
            logits = lm.model(input_ids=ids, use_cache=False).logits[0]
        finally:
            replaced.detach()
    return states, logits
