"""Rehearsal: tokens run after a text so that a cache method sees what they look at, then taken out of the cache again.

Each forward call of it is a step of its own, in phase `rehearsal`. The text's own logits are not touched, the rehearsed
tokens leave no row behind, and where no layer holds more than its budget nothing is rehearsed at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from workbench.engine.cache import EngineLayer
from workbench.engine.call import Call
from workbench.engine.policy import Rehearsal
from workbench.trace.schema import REHEARSAL


class Forward(Protocol):
    """A forward call of the session's model. Returns the logits `[B, V]` after the last token."""

    def __call__(
        self, phase: str, positions: torch.Tensor, seen: list[int], position_ids: torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Runs tokens at `positions` `[B, Q]`, rotated by `position_ids` `[B, Q]`, after which rows have `seen` tokens."""
        ...


def rehearse(rehearsal: Rehearsal, layers: Sequence[EngineLayer], call: Call, logits: torch.Tensor, forward: Forward) -> None:
    """Lets the layers that hold more than their budget decide by what the rehearsed tokens look at.

    `logits` `[B, V]` are those after the text, from which the greedy continuation starts.
    """
    due = [layer.is_due() for layer in layers]
    if not any(due):
        return
    seen, text_call = list(call.seen), (call.phase, call.positions, call.has_padding)
    for layer, foresees in zip(layers, due, strict=True):
        layer.begin_rehearsal(foresees)
    following = torch.tensor(seen, dtype=torch.int32, device=logits.device)[:, None]

    def run(ids: torch.Tensor, first: int) -> torch.Tensor:
        positions = following + torch.arange(first, first + ids.shape[1], dtype=torch.int32, device=ids.device)
        reached = [tokens + first + ids.shape[1] for tokens in seen]
        return forward(REHEARSAL, positions, reached, (positions + rehearsal.shift).clamp(min=0), input_ids=ids)

    if rehearsal.tokens is not None:
        run(torch.tensor(rehearsal.tokens, device=logits.device), 0)
    else:
        for number in range(rehearsal.count):
            logits = run(logits.argmax(-1, keepdim=True), number)
    call.seen = seen
    for layer in layers:
        layer.end_rehearsal()
    call.phase, call.positions, call.has_padding = text_call
