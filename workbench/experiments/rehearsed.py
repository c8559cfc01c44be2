"""What rehearsed tokens look at, noted for a recording: `wb.record(lm, prompt, rehearse=["dapq"])`.

A method that rehearses tokens of its own (DapQ, LookaheadKV) decides by attention that a dense run does not compute. So the
method's own rehearsal runs after the same prompt, once for all budgets, and what it foresees is kept in place of a decision.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import torch

from workbench.engine.policy import FORESIGHT, CachePolicy, LayerState
from workbench.engine.session import Session
from workbench.errors import UserError
from workbench.methods.base import Method, parse_method
from workbench.methods.cache.base import CacheMethod
from workbench.models.load import LM


def rehearsal_of(method: CachePolicy, prompt: list[int]) -> dict[str, Any]:
    """A method's rehearsal after a prompt, as JSON gives it back: methods that rehearse the same share a recording of it."""
    return json.loads(json.dumps(dataclasses.asdict(method.rehearsal([prompt]))))


def continues(rehearsal: dict[str, Any], steps: int) -> bool:
    """Whether a rehearsal is of the model's own continuation and no longer than the steps recorded of it."""
    own = rehearsal["tokens"] is not None or rehearsal["shift"] or rehearsal["trained"]
    return not own and rehearsal["count"] <= steps


def to_rehearse(given: Iterable[Method | str], prompt: list[int], steps: int) -> list[tuple[CacheMethod, dict[str, Any]]]:
    """One method for each rehearsal that is not in the recording anyway. Methods that rehearse nothing are left out.

    Raises UserError for a method that is none.
    """
    found: list[tuple[CacheMethod, dict[str, Any]]] = []
    for each in given:
        method = parse_method(each) if isinstance(each, str) else each
        if not isinstance(method, Method):
            raise UserError(f"Cannot rehearse {method!r}; give methods, such as 'dapq' or wb.DapQ(tokens=16).")
        if not isinstance(method, CacheMethod) or FORESIGHT not in method.needs:
            continue
        rehearsal = rehearsal_of(method, prompt)
        if not continues(rehearsal, steps) and rehearsal not in [known for _, known in found]:
            found.append((method, rehearsal))
    return found


def foresight(lm: LM, method: CacheMethod, prompt: list[int]) -> dict[int, torch.Tensor]:
    """`[Hq, P]` float32 by layer: what each prompt token receives from the tokens a method rehearses after the prompt.

    Raises UserError if the model's context has no room for them, nothing was trained for the model, or nothing can be dropped.
    """
    if len(prompt) < 2:
        raise UserError(f"{method.name!r} rehearses nothing after a prompt of 1 token, which always stays; give a longer one.")
    seen: dict[int, torch.Tensor] = {}

    def note(state: LayerState) -> torch.Tensor:
        assert state.foresight is not None
        seen[state.layer] = state.foresight[0].clone()
        return state.occupied

    listening = method.with_budget(1)  # so small that every layer has to decide
    object.__setattr__(listening, "keep", note)
    session = Session(lm, listening)
    session.prefill(prompt)
    session.close()
    return seen
