"""Which keys the model looked at: attention mass by key position, from the queries and keys of a call."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workbench.errors import UserError
from workbench.trace.store import TraceWriter
from workbench_kernels.column_mass import column_mass

MODES = ("off", "decode", "window", "full")
WINDOW = 32
"""Queries observed at the end of a prompt in mode `window`."""
EXACT_POSITIONS, TOP_POSITIONS, POOLS = 2048, 128, 128
FULL_BYTES, MORE_BYTES = 6 * 2**20, 3 * 2**19


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


class ImportanceLog:
    """Turns masses into rows of the importance table, so that a trace of any length stays small.

    Up to `EXACT_POSITIONS` positions a row holds every mass. Beyond, it holds the highest ones exactly and the rest as sums
    over equal stretches of positions. Decode steps get a row each until the table has grown to `FULL_BYTES`; from then on
    every row sums over twice as many steps for each further `MORE_BYTES`.
    """

    def __init__(self, writer: TraceWriter):
        self._writer = writer
        self._written_bytes = 0
        self._steps_a_row = 1
        self._waiting: dict[int, tuple[int, int, torch.Tensor, int]] = {}

    def add(self, step: int, layer: int, start: int, mass: torch.Tensor, window: int, decoding: bool) -> None:
        """Takes one layer's mass `[B, Hq, positions]` from position `start` on, summed over `window` queries."""
        before = self._waiting.pop(layer, None)
        if before is not None and not decoding:
            self._write(layer, *before)
        elif before is not None:
            _, earlier_start, earlier, queries = before
            mass = F.pad(mass, (start - earlier_start, 0))
            mass = mass + F.pad(earlier, (0, mass.shape[-1] - earlier.shape[-1]))
            start, window = earlier_start, window + queries
        if decoding and window < self._steps_a_row:
            self._waiting[layer] = (step, start, mass, window)
        else:
            self._write(layer, step, start, mass, window)

    def flush(self) -> None:
        """Writes the sums that wait for further steps."""
        waiting, self._waiting = self._waiting, {}
        for layer, sums in waiting.items():
            self._write(layer, *sums)

    def meta(self) -> dict[str, int]:
        """What was pooled, for the trace's meta."""
        return {
            "exact_positions": EXACT_POSITIONS,
            "top_positions": TOP_POSITIONS,
            "pools": POOLS,
            "decode_steps_a_row_at_the_end": self._steps_a_row,
        }

    def _write(self, layer: int, step: int, start: int, mass: torch.Tensor, window: int) -> None:
        length = mass.shape[-1]
        if length <= EXACT_POSITIONS:
            parts = (mass.to(torch.float16).cpu().numpy(),)
        else:
            sums, top, masses = pool(mass)
            parts = tuple(part.cpu().numpy() for part in (sums, top + start, masses))
        for row in range(mass.shape[0]):
            for head in range(mass.shape[1]):
                values = [part[row, head] for part in parts] + [None] * (3 - len(parts))
                self._writer.add("importance", step, row, layer, head, window, start, length, *values)
        entries = length if length <= EXACT_POSITIONS else 3 * TOP_POSITIONS + POOLS
        self._written_bytes += 2 * entries * mass.shape[0] * mass.shape[1]
        while self._written_bytes > FULL_BYTES + MORE_BYTES * (self._steps_a_row.bit_length() - 1):
            self._steps_a_row *= 2


def pool(mass: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Splits mass `[..., positions]` into sums over `POOLS` equal stretches, and the highest masses with their positions.

    The highest masses are left out of the sums.
    """
    length = mass.shape[-1]
    top, positions = mass.topk(TOP_POSITIONS, dim=-1)
    rest = F.pad(mass.scatter(-1, positions, 0.0), (0, -length % POOLS))
    sums = rest.unflatten(-1, (POOLS, -1)).sum(-1)
    return sums.to(torch.float16), positions.to(torch.int32), top.to(torch.float16)
