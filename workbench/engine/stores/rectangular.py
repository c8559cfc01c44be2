"""A store with the same number of slots in every row and kv head of a layer.

Buffers are allocated ahead and grow by a sixteenth, so appending a token copies one token. Rows or heads that hold fewer
tokens than others have empty slots, marked by position -1. Side state (such as accumulated attention) lies beside K
and V and moves with them.
"""

from __future__ import annotations

import copy

import torch

SLACK = 8
"""Slots allocated ahead: this many, or a sixteenth of the length if that is more."""


class RectangularStore:
    """K `[B, H, N, D]`, V `[B, H, N, Dv]` and the position of every slot `[B, H, N]`."""

    def __init__(self, with_mass: bool = False):
        self._with_mass = with_mass
        self._buffers: dict[str, torch.Tensor] = {}
        self.length = 0
        self.has_empty_slots = False
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
    def mass(self) -> torch.Tensor | None:
        """`[B, H, N]` float32 accumulated attention, if the store keeps it."""
        return self._buffers["mass"][:, :, : self.length] if self._with_mass else None

    @property
    def occupied(self) -> torch.Tensor | None:
        """`[B, H, N]` bool, or None where no slot is empty."""
        return self.positions >= 0 if self.has_empty_slots else None

    def held_tokens(self) -> int:
        """Tokens held, over all rows and kv heads."""
        return int((self.positions >= 0).sum()) if self.has_empty_slots else self.positions.numel()

    def held_by_row(self) -> list[int]:
        """Tokens held by the fullest kv head of each row."""
        if not self.has_empty_slots:
            return [self.length] * self.positions.shape[0]
        return (self.positions >= 0).sum(-1).amax(1).tolist()

    def keep_mass(self, wanted: bool) -> None:
        """Starts the accumulated attention, at zero for the tokens held, or frees it."""
        if wanted == self._with_mass:
            return
        self._with_mass = wanted
        if self._buffers and wanted:
            self._buffers["mass"] = torch.zeros_like(self._buffers["positions"], dtype=torch.float32)
        elif self._buffers:
            del self._buffers["mass"]
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
        # The positions are those of all layers, so each store has its own copy, even where one head needs no expanding.
        new = {"keys": keys, "values": values, "positions": positions[:, None].repeat(1, keys.shape[1], 1)}
        if self._with_mass:
            new["mass"] = keys.new_zeros(keys.shape[:3], dtype=torch.float32)
        end = self.length + keys.shape[2]
        if not self._buffers:
            # The prompt stays where the model made it: an evicting method replaces it at once.
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
            room = num_slots + _slack(num_slots)
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
        room = length + _slack(length)
        moved = 0
        for name, buffer in self._buffers.items():
            index = order if buffer.ndim == 3 else order.unsqueeze(-1).expand(-1, -1, -1, buffer.shape[3])
            kept = buffer.new_empty(*buffer.shape[:2], room, *buffer.shape[3:])
            kept[:, :, :length] = buffer[:, :, : self.length].gather(2, index)
            self._buffers[name] = kept
            moved += 2 * kept[:, :, :length].nbytes
        self._weigh()
        empty = torch.arange(length, device=mask.device) < (length - counts).unsqueeze(-1)
        self._buffers["positions"][:, :, :length].masked_fill_(empty, -1)
        return moved

    def _reserve(self, length: int) -> None:
        if length <= self._buffers["keys"].shape[2]:
            return
        room = length + _slack(length)
        for name, buffer in self._buffers.items():
            grown = buffer.new_empty(*buffer.shape[:2], room, *buffer.shape[3:])
            grown[:, :, : self.length] = buffer[:, :, : self.length]
            self._buffers[name] = grown
        self._weigh()

    def _weigh(self) -> None:
        self.nbytes = sum(buffer.untyped_storage().nbytes() for buffer in self._buffers.values())


def _slack(length: int) -> int:
    return max(SLACK, length // 16)
