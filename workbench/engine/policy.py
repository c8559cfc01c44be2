"""What a cache method sees and what the engine expects of it. Pure values: no model, no store, no hook."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

from workbench.probes.rotation import Rotation

QUERIES, MASS, ROTATION, FORESIGHT, THINNING = "queries", "mass", "rotation", "foresight", "thinning"
"""What a method may need beyond keys, values and positions."""


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
    """`[B]` tokens each kv head may keep."""
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

    @property
    def occupied(self) -> torch.Tensor:
        """`[B, H, N]` whether a slot holds a token."""
        return self.positions >= 0

    @property
    def newest(self) -> torch.Tensor:
        """`[B, 1, 1]` position of the newest token of each row."""
        return self.positions.amax((1, 2), keepdim=True)


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

    def capacity(self, prompt_tokens: int) -> int | None:
        """Tokens each kv head may keep after a prompt of this length, on average over layers; None: no bound."""
        ...

    def allocate(self, prompt_tokens: int, num_layers: int) -> list[int] | None:
        """The same for each of the layers the method acts on, first to last."""
        ...

    def rehearsal(self, rows: Sequence[Sequence[int]]) -> Rehearsal:
        """What to rehearse after a text, given as the tokens of each row, if the method needs foresight."""
        ...

    def keep(self, state: LayerState) -> torch.Tensor:
        """`[B, H, N]` bool: the tokens that stay."""
        ...

    def thins_after(self, num_layers: int) -> int | None:
        """The layer whose tokens do not all go on to later layers, if the method needs thinning; None: they all do."""
        ...

    def keep_and_pass(self, state: LayerState) -> tuple[torch.Tensor, torch.Tensor]:
        """In that layer: what `keep` returns, and `[B, N]` bool: the tokens of this call that go on."""
        ...

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """FLOPs and bytes one call of `keep` adds."""
        ...
