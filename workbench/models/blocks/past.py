"""What a block remembers of the tokens before a call, found again by their positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Past:
    """States of the last tokens of each row. Shapes: B rows, n tokens remembered. Nothing in it is ever written to."""

    positions: torch.Tensor
    """`[B, n]`, -1 for padding."""
    states: torch.Tensor
    """`[B, n, ...]`."""

    @classmethod
    def empty(cls, like: torch.Tensor) -> Past:
        """Nothing yet, of rows like those of `like` `[B, T, ...]`."""
        return cls(torch.empty(len(like), 0, dtype=torch.int32, device=like.device), like[:, :0])

    def up_to(self, first: torch.Tensor, count: int, empty: torch.Tensor | float = 0.0) -> torch.Tensor:
        """`[B, count, ...]` the states before position `first` `[B]`, and `empty` where none is remembered."""
        wanted = first[:, None] - torch.arange(count, 0, -1, device=first.device)
        same = (self.positions[:, None] == wanted[..., None]) & (wanted[..., None] >= 0)
        missing = self.states.new_zeros(len(wanted), 1, *self.states.shape[2:]) + empty
        which = torch.where(same.any(-1), same.int().argmax(-1) if same.shape[-1] else 0, self.positions.shape[1])
        states = torch.cat([self.states, missing.to(self.states.dtype)], 1)
        index = which.view(*which.shape, *(1,) * (states.ndim - 2))
        return states.gather(1, index.expand(*which.shape, *states.shape[2:]))

    def followed(self, positions: torch.Tensor, states: torch.Tensor, count: int) -> Past:
        """With the tokens of a call, in place of any that stood there; the last `count` of them."""
        first = positions[:, -1:] - positions.shape[1] + 1
        stale = torch.where(self.positions >= first, -1, self.positions)
        stale, order = stale.sort(stable=True)
        known = self.states.gather(1, order.view(*order.shape, *(1,) * (self.states.ndim - 2)).expand_as(self.states))
        start = max(0, stale.shape[1] + positions.shape[1] - count)
        # Slices of their own, so that a prompt's states are not held as long as its last ones.
        return Past(torch.cat([stale, positions], 1)[:, start:].clone(), torch.cat([known, states], 1)[:, start:].clone())
