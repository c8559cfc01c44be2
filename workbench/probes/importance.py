"""Which keys the model looked at: attention mass by key position, from the queries and keys of a call."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from workbench.errors import UserError
from workbench_kernels.column_mass import column_mass

MODES = ("off", "decode", "window", "full")
WINDOW = 32
"""Queries observed at the end of a prompt in mode `window`."""


def check_mode(mode: str) -> str:
    """The mode itself. Raises UserError for one there is not."""
    if mode not in MODES:
        raise UserError(f"There is no importance mode {mode!r}; the modes are {', '.join(MODES)}.")
    return mode


def observes(mode: str, num_queries: int) -> bool:
    """Whether a call of so many queries is observed: none in mode `off`, only decoded tokens in mode `decode`."""
    return mode != "off" and (mode != "decode" or num_queries == 1)


def attention_mass(
    mode: str, query: torch.Tensor, key: torch.Tensor, scaling: float, *, asking: torch.Tensor | None = None, **options
) -> tuple[torch.Tensor, int]:
    """Mass by key slot `[B, Hq, N]`, summed over the observed queries, and how many they were.

    `window` observes the last 32 queries of a call, `full` all of them. A decode step has one query, so there both are
    the attention row itself. Nothing of size Q x N is held. `asking` `[B, Q]` is False for queries that are padding.
    """
    num_queries = query.shape[2]
    window = num_queries if mode == "full" else min(WINDOW, num_queries)
    start = num_queries - window
    asking = None if asking is None else asking[:, start:]
    return column_mass(query[:, :, start:], key, scaling, asking=asking, **options), window


def by_position(mass: torch.Tensor, positions: torch.Tensor, length: int) -> torch.Tensor:
    """Mass by slot `[B, Hq, N]` as mass by position `[B, Hq, length]`, 0 for tokens that are not held.

    `positions` `[B, H, N]` is the token in each slot, -1 for an empty one.
    """
    group = mass.shape[1] // positions.shape[1]
    slots = positions.long().repeat_interleave(group, 1)
    spread = mass.new_zeros(*mass.shape[:2], length + 1)
    return spread.scatter_(2, slots.where(slots >= 0, length), mass)[..., :length]


def importance_rows(step: int, layer: int, mass: torch.Tensor, window: int) -> Iterator[tuple]:
    """Rows of the importance table for one layer's mass `[B, Hq, positions]`."""
    for row, heads in enumerate(mass.to(torch.float16).cpu().numpy()):
        for head, masses in enumerate(heads):
            yield step, row, layer, head, window, masses
