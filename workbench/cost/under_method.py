"""A planned run under a cache method, from what the method says of each layer: plain numbers, so that nothing runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from workbench.cost.plan import table_of
from workbench.trace.anatomy import Anatomy
from workbench.trace.schema import TABLES
from workbench.trace.trace import Trace


@dataclass(frozen=True)
class LayerCosts:
    """One layer under a method: one number a forward call, the prefill first. FLOPs and bytes are those of one batch row."""

    kv_read: tuple[int, ...]
    """Tokens a kv head reads."""
    kv_held: tuple[int, ...]
    """Tokens a kv head holds while it does, its new ones included."""
    scoring_flops: tuple[int, ...]
    scoring_bytes: tuple[int, ...]
    """What observing, scoring and selecting add."""
    moved_bytes: tuple[int, ...]
    """K, V and what lies beside them, moved when tokens leave or turned when they change places."""


Says = Callable[[Anatomy, int, Sequence[int]], Mapping[int, LayerCosts]]
"""What a method says of a run: the anatomy, prompt tokens and the tokens seen at each decode step in, its layers' costs out.

`workbench.experiments.planned` makes it of a method. Layers the method leaves alone are left out.
"""


def under(trace: Trace, costs: Mapping[int, LayerCosts]) -> Trace:
    """A dense planned trace (`Plan.trace`) as it would be under a method with these costs."""
    if not costs:
        return trace
    steps = trace.arrow("steps")["step"].to_numpy()
    batch = trace.arrow("steps")["batch"][0].as_py()
    attention = {name: column.to_numpy().copy() for name, column in zip(*_columns(trace.arrow("attention")), strict=True)}
    operations = []
    for layer, each in costs.items():
        rows = np.flatnonzero(attention["layer"] == layer)
        attention["kv_read"][rows], attention["kv_held"][rows] = each.kv_read, each.kv_held
        attention["pairs"][rows[1:]] = batch * np.array(each.kv_read[1:])  # of the prefill they are the causal ones
        for op, flops, moved in (("score", each.scoring_flops, each.scoring_bytes), ("evict", (0,), each.moved_bytes)):
            added = np.stack(np.broadcast_arrays(steps, layer, np.multiply(batch, flops), np.multiply(batch, moved)))
            operations += [(op, *row) for row in added.T.tolist() if row[2] or row[3]]
    ops, *numbers = zip(*operations, strict=True) if operations else [()] * 5
    cache = dict(zip(("op", "step", "layer", "extra_flops", "extra_bytes"), (ops, *numbers), strict=True))
    changed = {"attention": table_of("attention", attention), "cache": table_of("cache", cache)}
    return Trace(trace.meta, {name: changed.get(name, trace.arrow(name)) for name in TABLES})


def _columns(table: pa.Table) -> tuple[list[str], list[pa.ChunkedArray]]:
    return table.column_names, table.columns
