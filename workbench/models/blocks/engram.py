"""Engram: what the last few tokens were, looked up in hashed tables and added to the residual stream.

Source: deepseek-ai/Engram, its demo (arXiv 2601.07372). Shapes: B rows, T tokens, V token ids, N the longest n-gram, H heads an
order, E = (N - 1) H head_dim the looked-up embedding, d hidden size, R tokens that the convolution looks back.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.blocks.attach import Forward, Progress
from workbench.models.blocks.past import Past

LAYERS = (1, 2)
"""Layers whose attention it comes before: the first two that have seen other tokens; the demo takes 1 and 15 of 30."""
ORDER, HEADS, HEAD_DIM, ROWS = 3, 8, 16, 1024
"""Longest n-gram, heads an order, elements of a head's row, and rows a head (more, up to the next primes)."""
KERNEL = 4
"""Taps of the convolution, `ORDER` tokens apart."""
_SEED_STEP = 10007
_TAKEN_BACK = 256
"""Tokens of a rehearsal or a draft that may be taken back at once, after which those before them are needed again."""


def compressed(texts: Iterable[str]) -> torch.Tensor:
    """`[V]` one number for all token ids whose texts are the same but for case, accents and the kind of white space.

    A text that is no whole character (half a UTF-8 sequence, which decodes to U+FFFD) is like no other.
    """
    numbers: dict[str | int, int] = {}
    keys = (number if "\ufffd" in text else _normal(text) or text for number, text in enumerate(texts))
    return torch.tensor([numbers.setdefault(key, len(numbers)) for key in keys])


def _normal(text: str) -> str:
    """NFKC, NFD without accents, lower case, runs of white space as one space, none at the ends of what is not only that."""
    plain = unicodedata.normalize("NFD", unicodedata.normalize("NFKC", text))
    plain = "".join(character for character in plain if not unicodedata.combining(character)).lower()
    return " ".join(plain.split()) or (" " if plain else "")


def multipliers(layer: int, order: int, num_ids: int, seed: int = 0) -> torch.Tensor:
    """`[N]` odd int64 numbers of a layer, so small that an id times one of them is no overflow."""
    bound = max(1, np.iinfo(np.int64).max // num_ids // 2)
    drawn = np.random.default_rng(seed + _SEED_STEP * layer).integers(0, bound, order, dtype=np.int64)
    return torch.from_numpy(2 * drawn + 1)


def primes(size: int, count: int) -> list[int]:
    """The first `count` primes that are `size` or more."""
    found: list[int] = []
    candidate = max(size, 2)
    while len(found) < count:
        if all(candidate % divisor for divisor in range(2, int(candidate**0.5) + 1)):
            found.append(candidate)
        candidate += 1
    return found


def hashes(window: torch.Tensor, multiplied: torch.Tensor, moduli: torch.Tensor) -> torch.Tensor:
    """`[B, T, N-1, H]` the row of each head for every token but the first N-1 of `window` `[B, N-1+T]` compressed ids.

    Order n takes XOR over k < n of `id[t-k] * multiplied[k]`, each head of it modulo its own prime `moduli[n-2, h]`.
    """
    order = len(multiplied)
    length = window.shape[1] - order + 1
    mixes, mix = [], None
    for back, multiplier in enumerate(multiplied):
        product = window[:, order - 1 - back :][:, :length] * multiplier
        mix = product if mix is None else mix ^ product
        mixes.append(mix)
    return torch.stack(mixes[1:], -1)[..., None] % moduli


def gate(key: torch.Tensor, hidden: torch.Tensor) -> torch.Tensor:
    """`[B, T, 1]` how much of what was looked up fits the hidden state: sigmoid of the signed root of their scaled product."""
    score = (key * hidden).sum(-1, keepdim=True) / key.shape[-1] ** 0.5
    return (score.abs().clamp(min=1e-6).sqrt() * score.sign()).sigmoid()


class EngramLayer(nn.Module):
    """The memory in front of one layer."""

    def __init__(self, hidden: int, moduli: torch.Tensor, multiplied: torch.Tensor, head_dim: int = HEAD_DIM):
        super().__init__()
        embedding = moduli.numel() * head_dim
        self.register_buffer("moduli", moduli)
        self.register_buffer("multiplied", multiplied)
        self.table = nn.Parameter(torch.randn(int(moduli.sum()), head_dim) * 0.02)
        self.key = nn.Linear(embedding, hidden, bias=False)
        self.value = nn.Linear(embedding, hidden, bias=False)
        nn.init.zeros_(self.value.weight)
        self.key_norm, self.hidden_norm, self.value_norm = (nn.RMSNorm(hidden, eps=1e-5) for _ in range(3))
        self.taps = nn.Parameter(torch.zeros(hidden, KERNEL))

    @property
    def reach(self) -> int:
        """R, how far back the convolution looks."""
        return len(self.multiplied) * (KERNEL - 1)

    def lookup(self, window: torch.Tensor) -> torch.Tensor:
        """`[B, T, E]` the rows of every token, end to end."""
        starts = F.pad(self.moduli.flatten().cumsum(0), (1, 0))[:-1].view(self.moduli.shape)
        return self.table[(hashes(window, self.multiplied, self.moduli) + starts).flatten(2)].flatten(2)

    def values(self, hidden: torch.Tensor, looked_up: torch.Tensor) -> torch.Tensor:
        """`[B, T, d]` gated values of what was looked up `[B, T, E]`."""
        return gate(self.key_norm(self.key(looked_up)), self.hidden_norm(hidden)) * self.value(looked_up)

    def added(self, past: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        """`[B, T, d]` what is added to the stream: the values, and a causal convolution over them and `past` `[B, R, d]`."""
        whole = self.value_norm(torch.cat([past, values], 1)).transpose(1, 2)
        mixed = F.conv1d(whole, self.taps[:, None], groups=len(self.taps), dilation=len(self.multiplied))
        return values + F.silu(mixed.transpose(1, 2))

    def flops(self, tokens: int) -> int:
        """Of two projections of E, the gate's product and the convolution."""
        return 2 * tokens * (self.key.weight.numel() + self.value.weight.numel() + self.taps.numel() + len(self.taps))

    def weight_bytes(self) -> int:
        """Bytes of what every call reads: all but the table."""
        return sum(each.nbytes for name, each in self.named_parameters() if name != "table")

    def gathered_bytes(self, tokens: int) -> int:
        """Bytes of the table's rows that so many tokens look up."""
        return tokens * self.moduli.numel() * self.table.shape[1] * self.table.element_size()


class EngramBlock(nn.Module):
    """The memories of a model, and the table that compresses its token ids."""

    def __init__(self, layers: Iterable[int], compressed_ids: torch.Tensor, pad: int, hidden: int, rows: int = ROWS):
        super().__init__()
        layers = tuple(layers)
        self.register_buffer("compressed", compressed_ids)
        self.register_buffer("pad", compressed_ids[pad].clone())
        num_ids = int(compressed_ids.max()) + 1
        moduli = torch.tensor(primes(rows, len(layers) * (ORDER - 1) * HEADS)).view(len(layers), ORDER - 1, HEADS)
        self.by_layer = nn.ModuleDict(
            {
                str(layer): EngramLayer(hidden, of_layer, multipliers(layer, ORDER, num_ids))
                for layer, of_layer in zip(layers, moduli, strict=True)
            }
        )

    def forwards(
        self, embedding: nn.Module, layers: list[nn.Module], call: Progress | None = None
    ) -> Mapping[nn.Module, Forward]:
        """What runs in place of a model's embedding and of the layers that have a memory; see `Reading`."""
        reading = Reading(self, call)
        return {embedding: reading.read} | {
            layers[int(name)]: reading.before(int(name), memory) for name, memory in self.by_layer.items()
        }


class Reading:
    """A model with its memories in a forward call: the embedding tells the ids, the layers add what these call up.

    What a call needs of earlier ones is kept in the session's `call.memory` by position: compressed ids, which
    n-grams begin with, and gated values, over which the convolution goes. So a branch has its own, tokens that were
    taken back are not looked at, and what was run without the block is like padding. Nothing is added to
    embeddings that are no token's, such as LookaheadKV's.
    """

    def __init__(self, block: EngramBlock, call: Progress | None):
        self._block, self._call = block, call
        self._step: int | None = None

    def read(self, original: Forward, ids: torch.Tensor) -> torch.Tensor:
        """The embedding: what was looked up is found from its ids."""
        block, call = self._block, self._call
        new = block.compressed[ids]
        self._step = 0 if call is None else call.step
        self._positions = torch.arange(ids.shape[1], device=ids.device).expand(ids.shape) if call is None else call.positions
        new = torch.where(self._positions < 0, block.pad, new)
        self._window = torch.cat([self._past("ids", new, ORDER - 1, block.pad), new], 1)
        return original(ids)

    def before(self, layer: int, memory: EngramLayer) -> Forward:
        """A decoder layer with its memory in front."""

        def forward(original: Forward, hidden: torch.Tensor, *args, **kwargs):
            known = self._step == (0 if self._call is None else self._call.step)
            return original(hidden + self._added(layer, memory, hidden) if known else hidden, *args, **kwargs)

        return forward

    def _added(self, layer: int, memory: EngramLayer, hidden: torch.Tensor) -> torch.Tensor:
        call, looked_up = self._call, memory.lookup(self._window)
        thinned = None if call is None or hidden.shape[1] == looked_up.shape[1] else call.thinned.index
        if thinned is not None:
            looked_up = _taken(looked_up, thinned)
        values = memory.values(hidden.to(memory.taps.dtype), looked_up)
        if call is not None and call.has_padding:
            values = values.masked_fill((call.positions < 0)[..., None], 0)
        if thinned is not None:
            where = thinned[..., None].expand_as(values)
            values = values.new_zeros(*self._positions.shape, values.shape[-1]).scatter_add(1, where, values)
        added = memory.added(self._past(f"values {layer}", values, memory.reach), values)
        if call is not None:
            tokens, weights = hidden[..., 0].numel(), memory.weight_bytes()
            read = weights + memory.gathered_bytes(tokens)
            moved = read + 2 * hidden.nbytes
            call.work(layer, "method", changed=tokens, flops=memory.flops(tokens), bytes=moved, weight_bytes=read)
        return (added if thinned is None else _taken(added, thinned)).to(hidden.dtype)

    def _past(self, name: str, new: torch.Tensor, reach: int, empty: torch.Tensor | float = 0.0) -> torch.Tensor:
        """`[B, reach, ...]` what there was before the call's tokens, which are remembered."""
        if self._call is None:
            return new.new_zeros(len(new), reach, *new.shape[2:]) + empty
        key = f"engram {name}"
        known = self._call.memory.get(key)
        first = self._positions[:, -1] - self._positions.shape[1] + 1
        before = Past.empty(new) if known is None else known
        self._call.memory[key] = before.followed(self._positions, new, reach + _TAKEN_BACK)
        return before.up_to(first, reach, empty)


def _taken(states: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The states `[B, T, d]` of the tokens `[B, T']`."""
    return states.gather(1, index[..., None].expand(*index.shape, states.shape[-1]))
