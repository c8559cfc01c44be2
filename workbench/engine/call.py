"""The forward call in progress: what the session tells the cache layers, and what they write about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from workbench.probes.moe import Choice
from workbench.trace.anatomy import Attention
from workbench.trace.pairs import causal_pairs
from workbench.trace.store import TraceWriter

if TYPE_CHECKING:
    from workbench.engine.cache import EngineLayer
    from workbench.engine.joint import Report

Number = int | torch.Tensor

_MANY_ROWS = 256
"""From here on rows are written as columns, which a prompt's evictions need and a decode step's do not."""


@dataclass(frozen=True)
class Waiting:
    """A layer that has attended and not decided."""

    layer: EngineLayer
    query: torch.Tensor
    """`[B, Hq, 1, D]`."""
    scaling: float


@dataclass(frozen=True)
class Thinned:
    """The tokens of a call that went on to the later layers, and those that did not.

    Shapes: L' tokens that went on, L tokens that had gone on until then (Q the first time).
    """

    index: torch.Tensor
    """`[B, L']` which of the call's tokens they are; a row with fewer is filled up in front."""
    last: torch.Tensor
    """`[B, L']` which of the L they are."""
    before: torch.Tensor
    """`[B, L]` positions of the L."""
    counts: list[int]
    """How many of each row went on."""
    absent: torch.Tensor
    """`[B, Q]` positions of the call's other tokens; -1 elsewhere."""


@dataclass(frozen=True)
class Work:
    """What a routing method computed in one layer. Numbers may still be on the device."""

    layer: int
    component: str
    changed: Number
    flops: Number | None
    bytes: Number | None
    weight_bytes: Number | None


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
    thinned: Thinned | None = None
    """Set while a call runs layers that not all of its tokens reach."""
    prompt_tokens: list[int] = field(default_factory=list)
    """Tokens in each row's prompt."""
    divided_at: list[int] = field(default_factory=list)
    """Tokens each row had seen when the capacity was resolved."""
    reports: list[Report] = field(default_factory=list)
    """What layers have reported in this call, until the last one has."""
    waiting: list[Waiting] = field(default_factory=list)
    """Layers that leave the decision on this call until all layers have run."""
    kept: dict[int, torch.Tensor] = field(default_factory=dict)
    """What layers that choose for others have kept in this call: `[B, H, N]` bool, by layer."""
    read: dict[int, torch.Tensor] = field(default_factory=dict)
    """The pages they have chosen to read: `[B, S, P]` bool, by layer."""
    importance: str = "off"
    masses: list[tuple[int, torch.Tensor, int]] = field(default_factory=list)
    """Layer, attention mass by position `[B, Hq, seen]` and observed queries, until the session writes them."""
    received: dict[int, torch.Tensor] | None = None
    """Attention mass by position `[B, seen]`, over heads, of layers that attend while a routing method wants to see it."""
    choices: dict[int, Choice] = field(default_factory=dict)
    """What a routing method gave the tokens of a layer in this call, in place of what the model chose."""
    works: list[Work] = field(default_factory=list)
    """What it computed in this call."""
    memory: dict[str, Any] = field(default_factory=dict)
    """What it has to remember from call to call; a branch goes on with a copy, so values are replaced, never changed."""

    @property
    def since_prompt(self) -> int:
        """Tokens each row has seen after its prompt, this call's included."""
        return self.seen[0] - self.prompt_tokens[0]

    def thin(self, passing: torch.Tensor) -> None:
        """From the next layer on, only the tokens of `passing` `[B, L]` are there, of the L that have come so far."""
        counts, before = passing.sum(-1), self.positions
        length, there = int(counts.max()), passing.shape[1]
        if length == there and bool((passing | (before < 0)).all()):
            return
        index = last = passing.to(torch.int8).argsort(dim=-1, stable=True)[:, there - length :]
        absent = torch.where(passing, -1, before)
        if self.thinned is not None:
            absent = self.thinned.absent.scatter_reduce(1, self.thinned.index, absent, "amax")
            index = self.thinned.index.gather(1, last)
        self.thinned = Thinned(index, last, before, counts.tolist(), absent)
        filling = torch.arange(length, device=passing.device) < (length - counts)[:, None]
        self.positions = before.gather(1, last).masked_fill(filling, -1)
        self.has_padding = min(self.thinned.counts) < length

    def routed(self, layer: int, num_choices: int, experts: torch.Tensor, weights: torch.Tensor) -> None:
        """What a routing method gave each token of a layer: `[T, k]` of so many choices (that number: none), and weights."""
        self.choices[layer] = Choice(layer, num_choices, experts, weights, None, self.positions_of(len(experts)))

    def work(
        self,
        layer: int,
        component: str,
        *,
        changed: Number,
        flops: Number | None = None,
        bytes: Number | None = None,
        weight_bytes: Number | None = None,
    ) -> None:
        """Says what a routing method did in a layer of this call.

        Args:
            layer: which.
            component: whose work it replaces, or `method` for what it adds.
            changed: tokens for which something else was computed than the model would have.
            flops: of the component, in place of those that follow from shapes; None leaves these.
            bytes: the same of what a fused kernel moves.
            weight_bytes: the part of these that are weights read.
        """
        self.works.append(Work(layer, component, changed, flops, bytes, weight_bytes))

    def positions_of(self, num_tokens: int) -> torch.Tensor:
        """Where so many tokens stand, over rows: what follows attention in a layer that thins still sees them all."""
        return self.positions if self.positions.numel() == num_tokens else self.thinned.before

    def record_attention(
        self,
        layer: int,
        attention: Attention,
        shape: torch.Size,
        num_slots: int,
        kernel: str,
        selected: torch.Tensor | None = None,
    ) -> None:
        """Writes a layer's attention.

        `shape` is that of the queries, `[B, Hq, Q, D]`; `num_slots` are held before it. If only some of them are read by one
        query, `selected` `[B, S, N]` says which of the N slots read by each of S heads it may see.
        """
        batch, _, num_queries, _ = shape
        window = attention.window
        if selected is not None:
            pairs = round(int(selected.sum()) / selected.shape[1])
            row = (batch, num_queries, selected.shape[2], num_slots, pairs, kernel, "selected")
            return self.writer.add("attention", self.step, layer, *row)
        if self.has_padding:
            past = num_slots - num_queries
            there = [(min(num_queries, seen), seen) for seen in self.seen]
            if self.thinned is not None:
                there = [(count, past + count) for count in self.thinned.counts]
            pairs = sum(causal_pairs(*each, window) for each in there)
        else:
            pairs = batch * causal_pairs(num_queries, num_slots, window)
        read = num_slots if window is None else min(num_slots, window - 1 + num_queries)
        kept = num_slots if window is None else min(num_slots, window - 1)
        kind = "causal" if window is None else "sliding"
        self.writer.add("attention", self.step, layer, batch, num_queries, read, kept, pairs, kernel, kind)

    def record_evictions(self, layers: Sequence[int], dropped: torch.Tensor, into: torch.Tensor | None = None) -> None:
        """Writes one row a dropped token. `dropped` `[L B, H, N]` holds their positions by layer and row, -1 elsewhere.

        `into` holds the positions of the tokens they were merged into, if they were.
        """
        gone = dropped.ge(0)
        numbers, heads, _ = (index.cpu().numpy() for index in gone.nonzero(as_tuple=True))
        which, rows = np.divmod(numbers, len(dropped) // len(layers))
        merged = np.full(len(rows), -1) if into is None else into[gone].cpu().numpy()
        columns = rows, np.asarray(layers)[which], heads, dropped[gone].cpu().numpy(), merged
        if len(rows) > _MANY_ROWS:
            self.writer.add_columns("evictions", self.step, *columns)
            return
        for where in zip(*(column.tolist() for column in columns), strict=True):
            self.writer.add("evictions", self.step, *where)
