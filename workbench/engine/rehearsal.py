"""Rehearsal: tokens run after a text so that a cache method sees what they look at, then taken out of the cache again.

Each forward call of it is a step of its own, in phase `rehearsal`. The text's own logits are not touched, the rehearsed
tokens leave no row behind, and where no layer holds more than its budget nothing is rehearsed at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch

from workbench.engine.cache import EngineLayer
from workbench.engine.call import Call
from workbench.engine.policy import FORESIGHT, CachePolicy, Rehearsal
from workbench.errors import UserError
from workbench.models.lookahead import Lookahead, trained_lookahead
from workbench.trace.schema import REHEARSAL

if TYPE_CHECKING:
    from workbench.models.load import LM


class Forward(Protocol):
    """A forward call of the session's model. Returns the logits `[B, V]` after the last token."""

    def __call__(
        self, phase: str, positions: torch.Tensor, seen: list[int], position_ids: torch.Tensor, **inputs: torch.Tensor
    ) -> torch.Tensor:
        """Runs tokens at `positions` `[B, Q]`, rotated by `position_ids` `[B, Q]`, after which rows have `seen` tokens."""
        ...


@dataclass(frozen=True)
class Plan:
    """What will be rehearsed: `count` tokens a row, with the model's trained ones where the method wants them."""

    rehearsal: Rehearsal
    count: int
    lookahead: Lookahead | None


def plan(
    lm: LM,
    policy: CachePolicy | None,
    layers: Sequence[EngineLayer],
    call: Call,
    phase: str,
    known: list[list[int]],
    new: list[list[int]],
) -> Plan | None:
    """What a policy rehearses after the known and the new tokens of each row, if it may have to decide in this phase.

    Raises UserError, before anything runs, if the model's context has no room for it or nothing was trained for the model.
    """
    if policy is None or FORESIGHT not in policy.needs:
        return None
    if phase not in policy.acts and not any(layer.undecided for layer in layers):
        return None
    text = [before + row for before, row in zip(known, new, strict=True)]
    limits = call.capacity.values()
    if not any(limit < len(row) for by_row in limits for limit, row in zip(by_row, text, strict=True)):
        return None
    rehearsal, context = policy.rehearsal(text), lm.anatomy.max_positions
    lookahead = trained_lookahead(lm.model, lm.name) if rehearsal.trained else None
    count = rehearsal.count if lookahead is None else lookahead.count
    longest = max(map(len, text)) + max(count + rehearsal.shift, 0)
    if context is not None and longest > context:
        raise UserError(
            f"{policy.name!r} rehearses {count} tokens after the text, {longest} in all, and {lm.name} has a context of "
            f"{context}; shorten the prompt."
        )
    return Plan(rehearsal, count, lookahead)


def rehearse(plan: Plan, layers: Sequence[EngineLayer], call: Call, logits: torch.Tensor, forward: Forward) -> None:
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

    def run(first: int, count: int, **tokens: torch.Tensor) -> torch.Tensor:
        positions = following + torch.arange(first, first + count, dtype=torch.int32, device=logits.device)
        reached = [before + first + count for before in seen]
        return forward(REHEARSAL, positions, reached, (positions + plan.rehearsal.shift).clamp(min=0), **tokens)

    if plan.lookahead is not None:
        with plan.lookahead.attached():
            run(0, plan.count, inputs_embeds=plan.lookahead.embeddings(len(seen)))
        for layer in layers:
            tokens = len(seen) * plan.count
            layer.record_adapter(plan.lookahead.flops(layer.index, tokens), plan.lookahead.adapter_bytes(layer.index))
    elif plan.rehearsal.tokens is not None:
        run(0, plan.count, input_ids=torch.tensor(plan.rehearsal.tokens, device=logits.device))
    else:
        for number in range(plan.count):
            logits = run(number, 1, input_ids=logits.argmax(-1, keepdim=True))
    call.seen = seen
    for layer in layers:
        layer.end_rehearsal()
    call.phase, call.positions, call.has_padding = text_call
