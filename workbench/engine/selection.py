"""What a decode step reads of a layer's cache, if a method selects it: whole pages, chosen by bounds on their keys.

A page is a stretch of so many tokens held, in the order of the text. Beside K and V lie the elementwise maximum and minimum
of each page's keys, brought up to date as tokens come; a method scores pages by them and never looks at the keys. Nothing is
evicted: K and V of the chosen pages are gathered, and attention reads those.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from operator import gt

import torch
import torch.nn.functional as F

from workbench.engine.call import Call
from workbench.engine.policy import CachePolicy, PageLevel, ReadState
from workbench.engine.stores.rectangular import RectangularStore


@dataclass(frozen=True)
class Source:
    """What attention reads in place of a store: S heads, those of K and V or, if each query head has its own, of the query."""

    keys: torch.Tensor
    """`[B, S, N, D]`."""
    values: torch.Tensor
    """`[B, S, N, Dv]`."""
    positions: torch.Tensor
    """`[B, S, N]`; -1 where a slot is read for nothing."""
    occupied: torch.Tensor | None
    """`[B, S, N]` bool, or None where every slot is read for something."""

    @property
    def length(self) -> int:
        """Slots read a head, N."""
        return self.keys.shape[2]


class Pages:
    """Bounds on the keys of a layer's pages, at one or more sizes."""

    def __init__(self, sizes: tuple[int, ...]):
        self.sizes = sizes
        """Tokens a page, the largest first; a method selects pages of the last size."""
        self.bounded = True
        """Whether there are bounds: pages that another layer chooses need none."""
        self._begun = False
        self._bounds: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._empty = torch.zeros(0)
        """`[B, H]` empty slots before the first token of each head."""
        self._least_empty: list[int] = []
        """Of the fullest head of each row."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated, pages in reserve included."""
        return sum(bound.nbytes for pair in self._bounds for bound in pair)

    def add(self, store: RectangularStore, num_new: int) -> None:
        """Takes in the last `num_new` tokens of a store."""
        if not self._begun:
            return self.rebuild(store)
        self._widen(store, store.length - num_new)

    def rebuild(self, store: RectangularStore) -> None:
        """Starts anew from what a store holds, which is put in the order of the text."""
        store.sort()
        self._empty = (store.positions < 0).sum(-1)
        self._least_empty = self._empty.amin(1).tolist()
        self._bounds, self._begun = [], True
        self._widen(store, 0)

    def held_by_row(self, length: int) -> tuple[int, ...]:
        """Tokens that the fullest kv head of each row holds in `length` slots; a device is not asked for it."""
        return tuple(length - empty for empty in self._least_empty)

    def levels(self, length: int) -> tuple[PageLevel, ...]:
        """The bounds of what is held in `length` slots."""
        held = length - self._empty
        levels = []
        for size, (highest, lowest) in zip(self.sizes, self._bounds, strict=True):
            count = self._count(length, size)
            there = torch.arange(count, device=held.device) * size < held[..., None]
            levels.append(PageLevel(size, highest[:, :, :count], lowest[:, :, :count], there))
        return tuple(levels)

    def gather(self, store: RectangularStore, chosen: torch.Tensor) -> Source | None:
        """K and V of the chosen pages `[B, S, P]` bool, S a multiple of H; None if these are all there are.

        A row one of whose heads reads all pages reads all of them in each head.
        """
        size, num_slots = self.sizes[-1], store.length
        by_row, num_pages = chosen.sum(-1).amax(1), chosen.shape[2]
        fewest, count = (int(each) for each in by_row.aminmax())
        if fewest == num_pages:
            return None
        if count == num_pages:  # some rows, not all
            chosen = chosen | (by_row == num_pages)[:, None, None]
        pages = chosen.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :count]
        heads = torch.arange(chosen.shape[1], device=pages.device) // (chosen.shape[1] // store.keys.shape[1])
        within = torch.arange(size, device=pages.device)
        slots = (pages * size + self._empty[:, heads, None])[..., None] + within
        there = (chosen.gather(2, pages)[..., None] & (slots < num_slots)).flatten(2)
        slots = slots.flatten(2).clamp(max=num_slots - 1)
        buffers = store.buffers()
        batch, num_heads, room = buffers["positions"].shape
        head = torch.arange(batch, device=pages.device)[:, None] * num_heads + heads
        rows = (slots + head[..., None] * room).flatten()
        keys, values, positions = (
            buffers[name].flatten(0, 2).index_select(0, rows).unflatten(0, slots.shape)
            for name in ("keys", "values", "positions")
        )
        return Source(keys, values, positions.masked_fill(~there, -1), there)

    def clone(self) -> Pages:
        """An independent copy."""
        other = copy.copy(self)
        other._bounds = [(highest.clone(), lowest.clone()) for highest, lowest in self._bounds]
        return other

    def _count(self, length: int, size: int) -> int:
        """Pages of the fullest head."""
        return -(-max(self.held_by_row(length)) // size)

    def _widen(self, store: RectangularStore, start: int) -> None:
        """Lets the tokens from slot `start` on widen the bounds of the pages they lie in."""
        if not self.bounded:
            return
        keys = store.keys[:, :, start:]
        ranks = torch.arange(start, store.length, device=keys.device) - self._empty[..., None]
        padding = (ranks < 0)[..., None]
        lowest_of_all, highest_of_all = torch.finfo(keys.dtype).min, torch.finfo(keys.dtype).max
        counts = [self._count(store.length, size) for size in self.sizes]
        if not self._bounds:
            none = keys[:, :, :0]
            self._bounds = [(none, none) for _ in self.sizes]
        for level, (size, count) in enumerate(zip(self.sizes, counts, strict=True)):
            highest, lowest = self._bounds[level]
            if count > highest.shape[2]:
                more = (0, 0, 0, count + max(1, count // 16) - highest.shape[2])
                highest, lowest = F.pad(highest, more, value=lowest_of_all), F.pad(lowest, more, value=highest_of_all)
                self._bounds[level] = (highest, lowest)
            page = (ranks.clamp(min=0) // size)[..., None].expand(keys.shape)
            highest.scatter_reduce_(2, page, keys.masked_fill(padding, lowest_of_all), "amax")
            lowest.scatter_reduce_(2, page, keys.masked_fill(padding, highest_of_all), "amin")


def pages_of(policy: CachePolicy | None, layer: int) -> Pages | None:
    """The pages of a layer that a policy selects from, if it does."""
    sizes = policy.page_sizes(layer) if policy is not None and policy.selects else ()
    return Pages(sizes) if sizes else None


def asks(policy: CachePolicy, pages: Pages, call: Call, length: int) -> tuple[bool, bool]:
    """Whether a layer asks its policy what to read, and whether that must be less than all it holds in `length` slots."""
    if call.phase != "decode":
        return False, False
    rows = list(zip(pages.held_by_row(length), call.prompt_tokens, strict=True))
    there = [-(-held // pages.sizes[-1]) for held, _ in rows]
    fewest, most = zip(*(policy.page_limits(*row) for row in rows), strict=True)
    return any(map(gt, there, fewest)), any(map(gt, there, most))


def read_state(query: torch.Tensor, pages: Pages, call: Call, layer: int, length: int) -> ReadState:
    """What a policy selects by."""
    return ReadState(query, pages.levels(length), layer, pages.held_by_row(length), tuple(call.prompt_tokens))


def reads_beside(source: Source | RectangularStore, num_kv_heads: int) -> int:
    """Bytes of K and V that are read beyond once a kv head, where each query head reads pages of its own."""
    share = 1 - num_kv_heads / source.keys.shape[1]
    return round(share * (source.keys.nbytes + source.values.nbytes))
