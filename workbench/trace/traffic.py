"""Bytes that a model's eager operations move, as polynomials in the sizes of a call.

An operation moves its operands and its results. Every tensor of a forward call has a size that is a sum of products of the
batch, the new tokens and the key slots, so the bytes of a component are one too, and a few coefficients say all of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from workbench.trace.schema import CATCH_UP, DRAFT, REHEARSAL, VERIFY, phase_of

TERMS = ("1", "t", "n", "tn", "b", "bt", "bn", "btn")
"""Products of batch `b`, new tokens a row `t` and key slots `n`, in the order of a polynomial's coefficients."""

EXPERT_TERMS = ("1", "t", "h", "th")
"""The same for experts: tokens `t` of the call and experts hit `h`."""


def regime(phase: str, batch: int, tokens: int, padding_mask: bool) -> str:
    """The name of the kind of call whose operations have the same polynomials: eager code copies less for one row."""
    if phase in (REHEARSAL, DRAFT, VERIFY, CATCH_UP):  # to the model's code, tokens that follow others
        phase = phase_of(tokens // batch, past=1)
    return " ".join([phase, *(["batched"] if batch > 1 else []), *(["masked"] if padding_mask else [])])


def terms(batch: Any, tokens: Any, slots: Any) -> np.ndarray:
    """The value of every one of `TERMS`, `[..., 8]`."""
    batch, tokens, slots = (np.asarray(size, dtype=np.int64) for size in (batch, tokens, slots))
    one_row = np.stack(np.broadcast_arrays(np.ones_like(tokens), tokens, slots, tokens * slots), -1)
    return np.concatenate([one_row, one_row * batch[..., None]], -1)


def expert_terms(tokens: Any, experts_hit: Any) -> np.ndarray:
    """The value of every one of `EXPERT_TERMS`, `[..., 4]`."""
    tokens, hit = (np.asarray(size, dtype=np.int64) for size in (tokens, experts_hit))
    return np.stack([np.ones_like(tokens), tokens, hit, tokens * hit], -1)
