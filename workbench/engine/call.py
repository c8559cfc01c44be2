"""The forward call in progress: what the session tells the cache layers, and what they write about it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from workbench.trace.anatomy import Attention
from workbench.trace.pairs import causal_pairs
from workbench.trace.store import TraceWriter

if TYPE_CHECKING:
    from workbench.engine.joint import Report


@dataclass
class Call:
    """One forward call, shared by all layers of a cache. The session updates it before each call."""

    writer: TraceWriter
    step: int = 0
    phase: str = "prefill"
    positions: torch.Tensor | None = None
    """`[B, Q]` position of every new token in its row; -1 for padding."""
    has_padding: bool = False
    seen: list[int] = field(default_factory=list)
    """Tokens each row has seen, this call's included, padding not counted."""
    capacity: dict[int, list[int]] = field(default_factory=dict)
    """Tokens each kv head may keep, by layer and row; a layer that is not listed has no bound."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Tokens in each row's prompt."""
    divided_at: list[int] = field(default_factory=list)
    """Tokens each row had seen when the capacity was resolved."""
    reports: list[Report] = field(default_factory=list)
    """What layers have reported in this call, until the last one has."""
    importance: str = "off"
    masses: list[tuple[int, torch.Tensor, int]] = field(default_factory=list)
    """Layer, attention mass by position `[B, Hq, seen]` and observed queries, until the session writes them."""

    @property
    def since_prompt(self) -> int:
        """Tokens each row has seen after its prompt, this call's included."""
        return self.seen[0] - self.prompt_tokens[0]

    def record_attention(self, layer: int, attention: Attention, shape: torch.Size, num_slots: int, kernel: str) -> None:
        """Writes a layer's attention. `shape` is that of the queries, `[B, Hq, Q, D]`; `num_slots` are held before it."""
        batch, _, num_queries, _ = shape
        window = attention.window
        if self.has_padding:
            pairs = sum(causal_pairs(min(num_queries, seen), seen, window) for seen in self.seen)
        else:
            pairs = batch * causal_pairs(num_queries, num_slots, window)
        read = num_slots if window is None else min(num_slots, window - 1 + num_queries)
        kept = num_slots if window is None else min(num_slots, window - 1)
        kind = "causal" if window is None else "sliding"
        self.writer.add("attention", self.step, layer, batch, num_queries, read, kept, pairs, kernel, kind)

    def record_evictions(self, layer: int, dropped: torch.Tensor) -> None:
        """Writes one row a dropped token. `dropped` `[B, H, N]` holds their positions, -1 elsewhere."""
        gone = dropped.ge(0)
        rows, heads, _ = (index.tolist() for index in gone.nonzero(as_tuple=True))
        where = zip(rows, heads, dropped[gone].tolist(), strict=True)
        self.writer.extend("evictions", ((self.step, row, layer, head, position, -1) for row, head, position in where))
