"""A store where each row and kv head of a layer holds as many tokens as it likes.

K and V are flattened: the tokens of one head lie together, followed by a few slots in reserve, then the next head. So
memory is the sum of the lengths and not the longest one times the heads. What needs one length for all, such as a
method's decision, is given a copy filled up with empty slots at the front of the shorter heads.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch

from workbench.engine.policy import MASS, Side
from workbench.engine.stores.rectangular import RectangularStore, filled, slack


@dataclass(frozen=True, eq=False)
class _Layout:
    """Where the heads lie. A step asks several times which slots these are; once tokens come or go there is another layout."""

    starts: torch.Tensor
    """`[B x H]` first slot of each head."""
    ends: torch.Tensor
    """`[B x H]` the slot after its last token."""
    length: int
    """Tokens of the longest head, N."""

    @cached_property
    def slots(self) -> torch.Tensor:
        """`[B x H, N]` the flat slot of each column of a padded copy; before the head's start where there is none."""
        columns = torch.arange(self.length, device=self.ends.device)
        return (self.ends - self.length)[:, None] + columns

    @cached_property
    def there(self) -> torch.Tensor:
        """`[B x H, N]` whether a column holds a token."""
        return self.slots >= self.starts[:, None]

    @cached_property
    def readable(self) -> torch.Tensor:
        """`[B x H x N]` the slots, each one that exists: what is read for an empty column does not matter."""
        return self.slots.clamp(min=0).flatten()

    @cached_property
    def columns(self) -> torch.Tensor:
        """Columns that hold a token, head by head, of a padded copy laid flat."""
        return self.there.flatten().nonzero().squeeze(1)

    @cached_property
    def held(self) -> torch.Tensor:
        """Flat slots that hold a token, in the same order."""
        return self.slots.flatten().index_select(0, self.columns)


class RaggedStore:
    """K `[S, D]`, V `[S, Dv]` and positions `[S]` of the B x H heads one after another; S slots, the reserve included.

    `keys`, `values`, `positions`, `side` and `occupied` are copies filled up to the longest head, `[B, H, N, ...]`.
    """

    def __init__(
        self,
        batch: int,
        num_heads: int,
        buffers: dict[str, torch.Tensor],
        side: Mapping[str, Side],
        rooms: list[int],
        lengths: list[int],
    ):
        self._shape = (batch, num_heads)
        self.declared = dict(side)
        """What is kept beside K and V, by name."""
        self._lay(buffers, rooms, lengths)

    @classmethod
    def of(cls, store: RectangularStore) -> RaggedStore:
        """A rectangular store's own memory, seen as heads of one length. Its empty slots have to go in the next `keep`."""
        buffers = store.buffers()
        batch, num_heads, room = buffers["positions"].shape
        heads = batch * num_heads
        flat = {name: buffer.flatten(0, 2) for name, buffer in buffers.items()}
        return cls(batch, num_heads, flat, store.declared, [room] * heads, [store.length] * heads)

    def rectangular(self) -> RectangularStore:
        """A copy with one length for all heads."""
        buffers = {name: self._padded(name) for name in self._buffers}
        return RectangularStore.holding(buffers, self.declared, has_empty_slots=len(set(self._lengths)) > 1)

    @property
    def keys(self) -> torch.Tensor:
        """`[B, H, N, D]`."""
        return self._padded("keys")

    @property
    def values(self) -> torch.Tensor:
        """`[B, H, N, Dv]`."""
        return self._padded("values")

    @property
    def positions(self) -> torch.Tensor:
        """`[B, H, N]` int32; -1 where a slot is empty."""
        return self._padded("positions")

    @property
    def side(self) -> dict[str, torch.Tensor]:
        """`[B, H, N]` each, or `[B, H, N, W]`: what is kept beside K and V, by name."""
        return {name: self._padded(name) for name in self.declared}

    @property
    def occupied(self) -> torch.Tensor | None:
        """`[B, H, N]` bool, or None where no slot is empty."""
        if len(set(self._lengths)) == 1:
            return None
        return self._layout.there.unflatten(0, self._shape)

    @property
    def flat(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        """Flattened keys and values, and the first slot of each head and the one after its last token, `[B x H]`."""
        return self._buffers["keys"], self._buffers["values"], self._layout.starts, self._layout.ends

    @property
    def length(self) -> int:
        """Tokens of the longest head, N."""
        return self._layout.length

    @property
    def mean_length(self) -> int:
        """Tokens a head holds on average, rounded up."""
        return -(-sum(self._lengths) // len(self._lengths))

    @property
    def element_bytes(self) -> int:
        """Bytes of one number of K and V."""
        return self._buffers["keys"].element_size()

    def held_tokens(self) -> int:
        """Tokens held, over all rows and kv heads."""
        return sum(self._lengths)

    def held_by_row(self) -> list[int]:
        """Tokens held by the fullest kv head of each row."""
        return [max(row) for row in self._rows()]

    def total_by_row(self) -> list[int]:
        """Tokens held by all kv heads of each row together."""
        return [sum(row) for row in self._rows()]

    def replace_side(self, wanted: Mapping[str, Side]) -> None:
        """Frees the side state and starts other, as `RectangularStore.replace_side` does."""
        going_on = {MASS} & self.declared.keys() & wanted.keys()
        for name in self.declared.keys() - going_on:
            del self._buffers[name]
        for name in wanted.keys() - going_on:
            self._buffers[name] = filled(self._buffers["positions"], wanted[name])
        self.declared = dict(wanted)
        self._weigh()

    def put_side(self, name: str, tensor: torch.Tensor) -> None:
        """Sets what is kept beside K and V under a name, where a slot holds a token; `tensor` is as in `side`."""
        new = tensor.flatten(0, 2).index_select(0, self._layout.columns)
        self._buffers[name].index_copy_(0, self._layout.held, new.to(self._buffers[name].dtype))

    def sort(self) -> None:
        """Puts the slots of each head in the order of their positions: evicting step by step mixes them up."""
        held = self._layout.held
        heads = torch.arange(len(self._lengths), device=held.device)
        heads = heads.repeat_interleave(self._layout.ends - self._layout.starts)
        order = ((heads << 32) + self._buffers["positions"][held]).argsort()
        self._rebuild(held[order], self._lengths)

    def append(self, keys: torch.Tensor, values: torch.Tensor, positions: torch.Tensor, has_padding: bool) -> None:
        """Adds the tokens of a call, `[B, H, Q, D]`. `positions` is `[B, Q]` int32. Only a prompt is padded."""
        assert not has_padding
        count = keys.shape[2]
        lengths = [length + count for length in self._lengths]
        if any(length > room for length, room in zip(lengths, self._rooms, strict=True)):
            self._rebuild(self._layout.held, self._lengths, extra=count)
        ends = self._layout.ends
        target = ends if count == 1 else (ends[:, None] + torch.arange(count, device=keys.device)).flatten()
        self._buffers["keys"].index_copy_(0, target, keys.flatten(0, 2))
        self._buffers["values"].index_copy_(0, target, values.flatten(0, 2))
        self._buffers["positions"].index_copy_(0, target, positions.repeat_interleave(self._shape[1], 0).flatten())
        for name, side in self.declared.items():
            self._buffers[name].index_fill_(0, target, side.fill)
        self._lengths = lengths
        self._layout = _Layout(self._layout.starts, ends + count, max(lengths))

    def keep(self, mask: torch.Tensor) -> int:
        """Keeps the slots of `mask` `[B, H, N]` and frees the rest. Returns the bytes moved."""
        mask = mask.flatten(0, 1)
        counts = mask.sum(-1)
        lengths = counts.tolist()
        reserve = self._reserve(lengths) * len(lengths)
        if sum(self._rooms) - sum(lengths) > 2 * reserve:
            return self._rebuild(self._layout.slots[mask], lengths)
        return self._fill_holes(mask, counts, lengths)

    def clone(self) -> RaggedStore:
        """An independent copy."""
        other = copy.copy(self)
        other._buffers = {name: buffer.clone() for name, buffer in self._buffers.items()}
        return other

    def _rows(self) -> list[list[int]]:
        batch, num_heads = self._shape
        return [self._lengths[row * num_heads : (row + 1) * num_heads] for row in range(batch)]

    def _padded(self, name: str) -> torch.Tensor:
        padded = self._buffers[name].index_select(0, self._layout.readable)
        padded = padded.view(*self._shape, self.length, *padded.shape[1:])
        if name == "positions":
            padded.masked_fill_(~self._layout.there.unflatten(0, self._shape), -1)
        return padded

    def _fill_holes(self, mask: torch.Tensor, counts: torch.Tensor, lengths: list[int]) -> int:
        """Moves the last tokens of each head into the slots that its dropped ones leave: few are dropped."""
        slots, starts = self._layout.slots, self._layout.starts
        behind = slots >= (starts + counts)[:, None]
        holes = slots[self._layout.there & ~(mask | behind)]
        movers = slots[mask & behind]
        for buffer in self._buffers.values():
            buffer.index_copy_(0, holes, buffer[movers])
        self._lengths = lengths
        self._layout = _Layout(starts, starts + counts, max(lengths))
        return 2 * len(movers) * self._token_bytes()

    def _rebuild(self, source: torch.Tensor, lengths: list[int], extra: int = 0) -> int:
        """Moves the tokens at flat slots `source`, head by head, into new buffers. Returns the bytes moved."""
        reserve = self._reserve(lengths) + extra
        rooms = [length + reserve for length in lengths]
        heads = torch.arange(len(lengths), device=source.device)
        heads = heads.repeat_interleave(torch.tensor(lengths, device=source.device), output_size=len(source))
        # Slots in reserve take a copy of slot 0, which no one reads.
        index = source.new_zeros(sum(rooms))
        index[torch.arange(len(source), device=source.device) + heads * reserve] = source
        self._lay({name: buffer.index_select(0, index) for name, buffer in self._buffers.items()}, rooms, lengths)
        return 2 * len(source) * self._token_bytes()

    def _reserve(self, lengths: list[int]) -> int:
        """Slots in reserve behind each head, the same for all: a token that comes is one more in each."""
        return slack(sum(lengths) // len(lengths))

    def _lay(self, buffers: dict[str, torch.Tensor], rooms: list[int], lengths: list[int]) -> None:
        self._buffers, self._rooms, self._lengths = buffers, rooms, lengths
        device = buffers["keys"].device
        starts = torch.tensor([0, *rooms[:-1]], device=device).cumsum(0)
        self._layout = _Layout(starts, starts + torch.tensor(lengths, device=device), max(lengths))
        self._weigh()

    def _token_bytes(self) -> int:
        return sum(buffer.nbytes // len(buffer) for buffer in self._buffers.values())

    def _weigh(self) -> None:
        self.nbytes = sum(buffer.untyped_storage().nbytes() for buffer in self._buffers.values())
        """Bytes allocated, slots held in reserve and side state included."""
