"""What a cache method sees and what the engine expects of it. Pure values: no model, no store, no hook."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch

from workbench.probes.rotation import Rotation

QUERIES, MASS, ROTATION, FORESIGHT, THINNING = "queries", "mass", "rotation", "foresight", "thinning"
"""What a method may need beyond keys, values and positions."""

REPORT = "report"
"""The name under which a layer's report stands in what `observe` returns."""

AT_END, CASCADE = "at end", "cascade"
"""When the layers divide a budget by what they report: once the last has, or anew after each."""


@dataclass(frozen=True)
class Side:
    """What a method keeps for each token and kv head, beside K and V: a number, or a row of them, and what they start as."""

    dtype: torch.dtype = torch.float32
    fill: float = 0
    shape: tuple[()] | tuple[int] = ()
    """`(W,)` for a row of W numbers."""

    @property
    def nbytes(self) -> int:
        """Bytes a token and kv head."""
        return self.dtype.itemsize * math.prod(self.shape)


@dataclass(frozen=True)
class LayerState:
    """One layer's cache at the moment of a decision.

    Shapes: B batch, Hq query heads, H kv heads, N slots, Q queries of this call, D head size. The tokens of this
    call stand in the last Q slots, the others in no promised order; `positions` says which token a slot holds.
    """

    keys: torch.Tensor
    """`[B, H, N, D]`, rotated."""
    values: torch.Tensor
    """`[B, H, N, D]`."""
    positions: torch.Tensor
    """`[B, H, N]` position of each token in its row, padding not counted; -1 where a slot is empty."""
    capacity: torch.Tensor
    """`[B]` tokens each kv head may keep; under a ragged method, on average over the heads of the layer."""
    scaling: float
    """Factor on the scores of this layer."""
    layer: int
    num_layers: int
    phase: str
    queries: torch.Tensor | None = None
    """`[B, Hq, Q, D]` the queries of this call, rotated, if the method needs them; they belong to the last Q slots."""
    mass: torch.Tensor | None = None
    """`[B, H, N]` attention each token has received in its life, summed over the group's query heads, if needed."""
    rotation: Rotation | None = None
    """How the layer rotates queries and keys by position, if the method needs it."""
    foresight: torch.Tensor | None = None
    """`[B, Hq, N]` attention each token received from the rehearsed tokens, summed over them, if the method needs it."""
    side: Mapping[str, torch.Tensor] = field(default_factory=dict)
    """`[B, H, N]` each, or `[B, H, N, W]`: what the method keeps beside K and V, by name."""
    share: torch.Tensor | None = None
    """`[B]` what `capacity` was when the budget was divided; the two differ only if a method lets it grow."""
    since_prompt: int = 0
    """Tokens each row has seen after its prompt, those of this call included."""
    dividing: bool = False
    """Whether layers decide because they have just divided the budget: then there are no queries, since other layers ran."""
    first: bool = False
    """Whether the method has not decided on what is held before: at the end of the prompt, or after a swap."""

    @cached_property
    def occupied(self) -> torch.Tensor:
        """`[B, H, N]` whether a slot holds a token."""
        return self.positions >= 0

    @cached_property
    def newest(self) -> torch.Tensor:
        """`[B, 1, 1]` position of the newest token of each row."""
        return self.positions.amax((1, 2), keepdim=True)

    @property
    def prompt_tokens(self) -> torch.Tensor:
        """`[B]` tokens in the prompt of each row, if its newest token is held."""
        return self.newest.view(-1) + 1 - self.since_prompt


@dataclass(frozen=True)
class PageLevel:
    """Bounds on the keys of P pages, `size` tokens held each; the last page of a head may hold fewer."""

    size: int
    highest: torch.Tensor
    """`[B, H, P, D]` elementwise maximum of the keys of each page."""
    lowest: torch.Tensor
    """`[B, H, P, D]` their minimum."""
    there: torch.Tensor
    """`[B, H, P]` whether a page holds any token; the bounds of one that does not mean nothing."""


@dataclass(frozen=True)
class ReadState:
    """What a method selects by, before the attention of a decode step; the new token is held already."""

    query: torch.Tensor
    """`[B, Hq, 1, D]`, rotated."""
    levels: tuple[PageLevel, ...]
    """One for each of the method's page sizes."""
    layer: int
    held: tuple[int, ...]
    """Tokens that the fullest kv head of each row holds."""
    prompt_tokens: tuple[int, ...]
    """Of each row."""


@dataclass(frozen=True)
class Merged:
    """K and V after a merge, and where the tokens that leave went."""

    keys: torch.Tensor
    """`[B, H, N, D]`; only those of the slots that stay matter."""
    values: torch.Tensor
    """`[B, H, N, Dv]`."""
    into: torch.Tensor
    """`[B, H, N]` position of the token that a slot's was merged into, -1 if into none."""


@dataclass(frozen=True)
class Rehearsal:
    """Tokens to run after the text and take back, so that a method sees what they look at."""

    count: int = 0
    """Tokens a row; those trained for the model know how many they are."""
    tokens: tuple[tuple[int, ...], ...] | None = None
    """Token ids of each row; None: the model's own greedy continuation, one by one."""
    shift: int = 0
    """Added to the positions the tokens are rotated by; without it they follow the text."""
    trained: bool = False
    """Whether the tokens are the soft ones trained for the model (`workbench.models.lookahead`)."""


class CachePolicy(Protocol):
    """A cache method as the engine uses it."""

    name: str
    needs: frozenset[str]
    """Of `queries`, `mass`, `rotation`, `foresight` and `thinning`."""
    acts: frozenset[str]
    """The phases after whose attention the method decides."""
    ragged: bool
    """Whether each kv head may keep a number of its own; the capacity then is the mean over the heads of a layer."""
    rowwise: bool
    """Whether it looks at one row at a time and, of what differs between layers, at capacity, K, V, queries and side state
    alone: then what all layers decide at a decode step may be decided in one go, their rows as the rows of one batch."""
    side: Mapping[str, Side]
    """What it keeps for each token beside K and V."""
    observes: frozenset[str]
    """The phases after whose attention it observes: `observe` is called, and the mass, if needed, is added up."""
    joint: str | None
    """`at end` or `cascade` if layers divide the budget by what they report; None: by `allocate` alone."""
    every: int
    """After the prompt it decides each time so many more tokens have been seen: 1 is at every call."""
    by_slot: bool
    """Whether attention takes a token's rank among those held for its position, once tokens are missing."""
    merges: bool
    """Whether tokens that leave change K and V of those that stay: then `merge` is asked after `keep`."""
    selects: bool
    """Whether a decode step may read only some of what is held: pages that `select` chooses."""

    def capacity(self, prompt_tokens: int) -> int | None:
        """Tokens each kv head may keep after a prompt of this length, on average over layers; None: no bound."""
        ...

    def allocate(self, prompt_tokens: int, num_layers: int) -> list[int] | None:
        """The same for each of the layers the method acts on, first to last."""
        ...

    def rehearsal(self, rows: Sequence[Sequence[int]]) -> Rehearsal:
        """What to rehearse after a text, given as the tokens of each row, if the method needs foresight."""
        ...

    def share(
        self, reports: Sequence[torch.Tensor], held: Sequence[Sequence[int]], prompt_tokens: Sequence[int], num_layers: int
    ) -> list[list[int]]:
        """Tokens each kv head may keep, by layer and row, of the layers that have reported so far, if the method is joint.

        Args:
            reports: `[B, ...]` of each layer.
            held: tokens that the fullest kv head holds, by layer and row.
            prompt_tokens: of each row.
            num_layers: how many layers will have reported at the end.
        """
        ...

    def grown(self, share: int, divided_at: int, seen: int) -> int:
        """What has become of a share, resolved when a row had seen `divided_at` tokens, now that it has seen more."""
        ...

    def observe(self, state: LayerState) -> dict[str, torch.Tensor]:
        """Side state anew, `[B, H, N]` or `[B, H, N, W]` by name, and a joint method's report `[B, ...]`."""
        ...

    def observation_cost(self, state: LayerState) -> tuple[int, int]:
        """FLOPs and bytes one call of `observe` adds."""
        ...

    def leader(self, number: int, count: int) -> int | None:
        """Which of the `count` layers it acts on chooses for the `number`-th of them, too; None if that one does itself.

        Such a layer keeps and reads what its leader, which comes before it, keeps and reads in the same call.
        """
        ...

    def keep(self, state: LayerState) -> torch.Tensor:
        """`[B, H, N]` bool: the tokens that stay."""
        ...

    def thins_after(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose tokens do not all go on to later layers, first to last, if the method needs thinning."""
        ...

    def keep_and_pass(self, state: LayerState) -> tuple[torch.Tensor, torch.Tensor]:
        """In those layers: what `keep` returns, and `[B, N]` bool: the tokens of this call that go on.

        It is asked only where a layer holds more than it may keep; no fewer may go on than later layers keep.
        """
        ...

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """FLOPs and bytes one call of `keep` adds."""
        ...

    def merge(self, state: LayerState, keep: torch.Tensor) -> Merged:
        """K and V of what stays, if the policy merges; `keep` is what it has just decided. `scoring_cost` includes it."""
        ...

    def page_sizes(self, layer: int) -> tuple[int, ...]:
        """Tokens a page at each level of a layer, the largest first, if the policy selects there; it selects of the last."""
        ...

    def page_limits(self, held: int, prompt_tokens: int) -> tuple[int, int]:
        """Fewest and most pages a head reads at a decode step when it holds so many tokens, if the policy selects."""
        ...

    def select(self, state: ReadState) -> torch.Tensor:
        """`[B, H, P]` bool: the pages that are read, by kv head; `[B, Hq, P]` if each query head reads its own."""
        ...

    def selection_cost(self, state: ReadState) -> tuple[int, int]:
        """FLOPs and bytes one call of `select` adds."""
        ...


def kept_beside(policy: CachePolicy | None) -> dict[str, Side]:
    """What a store keeps beside K and V for a policy: its own side state, and the accumulated attention if it needs it."""
    if policy is None:
        return {}
    return {**({MASS: Side()} if MASS in policy.needs else {}), **policy.side}
