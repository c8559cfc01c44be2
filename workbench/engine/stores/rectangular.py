"""A store with the same number of slots in every row and kv head of a layer.

Buffers are allocated ahead and grow by a sixteenth, so appending a token copies one token. Rows or heads that hold fewer
tokens than others have empty slots, marked by position -1. Side state (such as accumulated attention) lies beside K
and V and moves with them, by the same lines.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence

import torch

from workbench.engine.policy import MASS, Side

SLACK = 8
"""Slots allocated ahead: this many, or a sixteenth of the length if that is more."""


class RectangularStore:
    """K `[B, H, N, D]`, V `[B, H, N, Dv]` and the position of every slot `[B, H, N]`."""

    def __init__(self, side: Mapping[str, Side] | None = None):
        self.declared = dict(side or {})
        """What is kept beside K and V, by name."""
        self._buffers: dict[str, torch.Tensor] = {}
        self.length = 0
        self.has_empty_slots = False
        self.is_part = False
        """Whether the buffers lie in memory that other layers share."""
        self.nbytes = 0
        """Bytes allocated, slots held in reserve and side state included."""

    @property
    def keys(self) -> torch.Tensor:
        """`[B, H, N, D]`."""
        return self._buffers["keys"][:, :, : self.length]

    @property
    def values(self) -> torch.Tensor:
        """`[B, H, N, Dv]`."""
        return self._buffers["values"][:, :, : self.length]

    @property
    def positions(self) -> torch.Tensor:
        """`[B, H, N]` int32; -1 where a slot is empty."""
        return self._buffers["positions"][:, :, : self.length]

    @property
    def side(self) -> dict[str, torch.Tensor]:
        """`[B, H, N]` each, or `[B, H, N, W]`: what is kept beside K and V, by name."""
        return {name: self._buffers[name][:, :, : self.length] for name in self.declared}

    @property
    def occupied(self) -> torch.Tensor | None:
        """`[B, H, N]` bool, or None where no slot is empty."""
        return self.positions >= 0 if self.has_empty_slots else None

    def held_tokens(self) -> int:
        """Tokens held, over all rows and kv heads."""
        return int((self.positions >= 0).sum()) if self.has_empty_slots else self.positions.numel()

    @property
    def mean_length(self) -> int:
        """Slots a head reads: here all that there are."""
        return self.length

    @property
    def element_bytes(self) -> int:
        """Bytes of one number of K and V."""
        return self._buffers["keys"].element_size()

    @classmethod
    def holding(cls, buffers: dict[str, torch.Tensor], side: Mapping[str, Side], has_empty_slots: bool) -> RectangularStore:
        """A store of these buffers, all slots in use: `keys`, `values`, `positions` and the side state."""
        store = cls(side)
        store._buffers = buffers
        store.length, store.has_empty_slots = buffers["positions"].shape[2], has_empty_slots
        store._weigh()
        return store

    def buffers(self) -> dict[str, torch.Tensor]:
        """The memory itself, `[B, H, slots, ...]`, those held in reserve included."""
        return self._buffers

    def rectangular(self) -> RectangularStore:
        """The store itself: it has one length for all heads."""
        return self

    def held_by_row(self) -> list[int]:
        """Tokens held by the fullest kv head of each row."""
        if not self.has_empty_slots:
            return [self.length] * self.positions.shape[0]
        return (self.positions >= 0).sum(-1).amax(1).tolist()

    def total_by_row(self) -> list[int]:
        """Tokens held by all kv heads of each row together."""
        if not self.has_empty_slots:
            return [self.length * self.positions.shape[1]] * self.positions.shape[0]
        return (self.positions >= 0).sum((1, 2)).tolist()

    def put_side(self, name: str, tensor: torch.Tensor) -> None:
        """Sets what is kept beside K and V under a name, of all slots."""
        self._buffers[name][:, :, : self.length] = tensor

    def replace_side(self, wanted: Mapping[str, Side]) -> None:
        """Frees the side state and starts other, at its fill for the tokens held.

        Accumulated attention means the same to every method, so it goes on where it is wanted.
        """
        going_on = {MASS} & self.declared.keys() & wanted.keys()
        for name in self.declared.keys() - going_on if self._buffers else ():
            del self._buffers[name]
        for name in wanted.keys() - going_on if self._buffers else ():
            self._buffers[name] = filled(self._buffers["positions"], wanted[name])
        self.declared = dict(wanted)
        self._weigh()

    def sort(self) -> None:
        """Puts the slots in the order of their positions, empty ones first: evicting step by step mixes them up."""
        if not self._buffers or bool((self.positions.diff(dim=-1) >= 0).all()):
            return
        order = self.positions.argsort(dim=-1, stable=True)
        for buffer in self._buffers.values():
            index = order if buffer.ndim == 3 else order.unsqueeze(-1).expand(-1, -1, -1, buffer.shape[3])
            buffer[:, :, : self.length] = buffer[:, :, : self.length].gather(2, index)

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, has_padding: bool) -> None:
        """Adds the tokens of a call. `positions` is `[B, Q]` int32, -1 for padding."""
        new = {"keys": keys, "values": values, "positions": positions[:, None].expand(-1, keys.shape[1], -1)}
        new |= {name: filled(new["positions"], side) for name, side in self.declared.items()}
        end = self.length + keys.shape[2]
        if not self._buffers:
            # The prompt stays where the model made it: an evicting method replaces it at once. The positions are those of all
            # layers, so each store has its own copy, even where one head needs no expanding.
            new["positions"] = positions[:, None].repeat(1, keys.shape[1], 1)
            self._buffers = {name: tensor.contiguous() for name, tensor in new.items()}
            self._weigh()
        else:
            self._reserve(end)
            for name, tensor in new.items():
                self._buffers[name][:, :, self.length : end] = tensor
        self.length = end
        self.has_empty_slots |= has_padding

    def keep(self, mask: torch.Tensor) -> int:
        """Keeps the slots of `mask` `[B, H, N]` and frees the rest. Returns the bytes moved."""
        counts = mask.sum(-1)
        length = int(counts.max())
        moved = self._fill_hole(mask) if length == self.length - 1 else self._gather(mask, counts, length)
        self.length = length
        self.has_empty_slots = bool((counts < length).any())
        return moved

    def keep_last(self, num_slots: int) -> None:
        """Drops all but the last slots, for a sliding window: nothing moves until the buffer is full."""
        if self.length <= num_slots:
            return
        if self.length == self._buffers["keys"].shape[2]:
            start = self.length - num_slots
            room = num_slots + slack(num_slots)
            for name, buffer in self._buffers.items():
                moved = buffer.new_empty(*buffer.shape[:2], room, *buffer.shape[3:])
                moved[:, :, :num_slots] = buffer[:, :, start : self.length]
                self._buffers[name] = moved
            self.length = num_slots
            self._weigh()

    def crop(self, length: int) -> None:
        """Takes back what was appended beyond `length` slots. Nothing moves; the room stays for tokens to come."""
        self.length = length

    def clone(self) -> RectangularStore:
        """An independent copy."""
        other = copy.copy(self)
        other._buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        other.is_part = False
        return other

    def _fill_hole(self, mask: torch.Tensor) -> int:
        """Every row and head drops at least one slot: move the last slot into the first dropped one."""
        hole = (~mask).to(torch.uint8).argmax(-1, keepdim=True)
        last = self.length - 1
        self.positions.masked_fill_(~mask, -1)
        moved = 0
        for buffer in self._buffers.values():
            index = hole if buffer.ndim == 3 else hole.unsqueeze(-1).expand(-1, -1, -1, buffer.shape[3])
            tail = buffer[:, :, last : last + 1].clone()
            buffer.scatter_(2, index, tail)
            moved += 2 * tail.nbytes
        return moved

    def _gather(self, mask: torch.Tensor, counts: torch.Tensor, length: int) -> int:
        """Moves the kept slots into new buffers, those with fewer tokens filled up with empty slots at the front."""
        order = mask.to(torch.int8).argsort(dim=-1, stable=True)[..., mask.shape[-1] - length :]
        room = length + slack(length)
        moved = 0
        for name, buffer in self._buffers.items():
            index = order if buffer.ndim == 3 else order.unsqueeze(-1).expand(-1, -1, -1, buffer.shape[3])
            kept = buffer.new_empty(*buffer.shape[:2], room, *buffer.shape[3:])
            kept[:, :, :length] = buffer[:, :, : self.length].gather(2, index)
            self._buffers[name] = kept
            moved += 2 * kept[:, :, :length].nbytes
        self.is_part = False
        self._weigh()
        empty = torch.arange(length, device=mask.device) < (length - counts).unsqueeze(-1)
        self._buffers["positions"][:, :, :length].masked_fill_(empty, -1)
        return moved

    def _reserve(self, length: int) -> None:
        if length <= self._buffers["keys"].shape[2]:
            return
        room = length + slack(length)
        for name, buffer in self._buffers.items():
            grown = buffer.new_empty(*buffer.shape[:2], room, *buffer.shape[3:])
            grown[:, :, : self.length] = buffer[:, :, : self.length]
            self._buffers[name] = grown
        self.is_part = False
        self._weigh()

    def _weigh(self) -> None:
        buffers = self._buffers.values()
        self.nbytes = sum(buffer.nbytes if self.is_part else buffer.untyped_storage().nbytes() for buffer in buffers)


def stacked(stores: Sequence[RectangularStore]) -> RectangularStore:
    """One store whose rows are those of all, which have as many slots each: first the rows of the first, and so on.

    `spread` gives the stores their rows back. Where they lie end to end from the last time, nothing is copied.
    """
    first = stores[0]
    whole = copy.copy(first)
    whole._buffers = {name: _end_to_end([store._buffers[name] for store in stores]) for name in first._buffers}
    whole.has_empty_slots = any(store.has_empty_slots for store in stores)
    return whole


def spread(whole: RectangularStore, stores: Sequence[RectangularStore]) -> None:
    """Makes each store the rows of `whole` that are its own, without copying them."""
    for store, parts in zip(
        stores, zip(*(each.chunk(len(stores)) for each in whole._buffers.values()), strict=True), strict=True
    ):
        store._buffers = dict(zip(whole._buffers, parts, strict=True))
        store.length, store.has_empty_slots, store.is_part = whole.length, whole.has_empty_slots, True
        store._weigh()


def _end_to_end(buffers: list[torch.Tensor]) -> torch.Tensor:
    first = buffers[0]
    start, size, memory = first.storage_offset(), first.numel(), first.untyped_storage().data_ptr()
    follows = (
        each.untyped_storage().data_ptr() == memory and each.storage_offset() == start + number * size and each.is_contiguous()
        for number, each in enumerate(buffers)
    )
    if not all(follows):
        return torch.cat(buffers)
    return first.as_strided((len(buffers) * first.shape[0], *first.shape[1:]), first.stride(), start)


def filled(like: torch.Tensor, side: Side) -> torch.Tensor:
    """Side state at its fill, for the slots of a buffer of positions."""
    return torch.full((*like.shape, *side.shape), side.fill, dtype=side.dtype, device=like.device)


def slack(length: int) -> int:
    """Slots to hold in reserve for so many tokens."""
    return max(SLACK, length // 16)
