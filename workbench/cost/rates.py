"""What one machine reached in one dtype, by size, as `workbench doctor --calibrate` measured it."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

import numpy as np

PASSES = ("norm", "rotary", "silu", "gelu", "add", "copy")
"""Work on every element of a tensor, as eager code does it; `silu` and `gelu` with the product of a gated MLP."""

ATTENTION = ("causal", "masked", "blockwise", "eager", "cached", "decode")
"""Ways to attend. `causal` and `masked` are transformers' SDPA without and with a mask, `cached` is SDPA for one query;
`blockwise` and `decode` are the engine's for many queries and for one."""


@dataclass(frozen=True)
class Grid:
    """A measured rate over one or more sizes: log-log interpolated between the points, held beyond them."""

    axes: tuple[tuple[float, ...], ...]
    rates: tuple[float, ...]
    """One for each combination of sizes, the last axis running fastest."""

    def __call__(self, *sizes: Any) -> np.ndarray:
        """The rate at some sizes, one argument an axis; arrays broadcast."""
        values = np.log(np.reshape(self.rates, [len(axis) for axis in self.axes]))
        places = [
            np.interp(np.log(np.maximum(size, 1)), np.log(axis), np.arange(len(axis)))
            for size, axis in zip(np.broadcast_arrays(*map(np.asarray, sizes)), self.axes, strict=True)
        ]
        found = np.zeros(places[0].shape)
        for corner in itertools.product((0, 1), repeat=len(self.axes)):
            below = [np.floor(place).astype(int) for place in places]
            weights = [np.where(up, place - low, 1 - place + low) for up, place, low in zip(corner, places, below, strict=True)]
            index = [np.minimum(low + up, len(axis) - 1) for up, low, axis in zip(corner, below, self.axes, strict=True)]
            found = found + np.prod(weights, axis=0) * values[tuple(index)]
        return np.exp(found)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Grid:
        """The grid that `dataclasses.asdict` and JSON made a mapping."""
        return cls(tuple(tuple(axis) for axis in data["axes"]), tuple(data["rates"]))


@dataclass(frozen=True)
class Rates:
    """Everything measured in one dtype."""

    products: Grid
    """FLOP/s of a linear layer by rows, in_features and out_features, its weights in the cache."""
    reads: Grid
    """Bytes a second by the bytes gone through before they are met again: weights of a small model stay in the cache."""
    passes: Mapping[str, Grid]
    """Elements a second of each of `PASSES`, by elements."""
    attention: Mapping[str, Grid]
    """FLOP/s of each of `ATTENTION` by head_dim and by queries, or by keys for one query. Pairs the mask hides count
    where they are computed: in `masked` and `eager`."""
    step_s: float
    """What a forward call costs beside all that: Python, small operations, masks."""
    layer_s: float
    """The same for each decoder layer."""
    slowdown: Grid
    """How much longer the pieces take inside a model than alone, by the tokens of a step and the hidden size: caches are
    cold and memory is fresh there. Measured on random models."""

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Rates:
        """The rates `to_dict` wrote."""
        grids = {name: Grid.from_dict(data[name]) for name in ("products", "reads", "slowdown")}
        tables = {name: {kind: Grid.from_dict(grid) for kind, grid in data[name].items()} for name in ("passes", "attention")}
        numbers = {
            each.name: data[each.name] for each in fields(cls) if each.name not in {*grids, *tables} and each.name in data
        }
        return cls(**grids, **tables, **numbers)
