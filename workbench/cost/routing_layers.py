"""The numbers of expert routing, a row a layer: how even, how many experts a step hits and reads, how alike neighbours are."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pandas as pd

from workbench.cost.routing import balance, layer_kinds, reuse, specialisation, unique_experts

if TYPE_CHECKING:
    from workbench.trace.trace import Trace


def routing_layers(trace: Trace) -> pd.DataFrame:
    """One row a layer whose experts were called.

    `unique` and `expected` are experts a step, mean over steps; `read_bytes` the weights of the experts hit, over all steps,
    and `read_share` what that is of reading all of the layer's experts at every step. The columns of `balance`, `reuse` and
    `specialisation` follow; those of the latter two are null without the table `choices`, and `information` also where
    tokens have no text. Raises UserError if no expert was called.
    """
    hit = unique_experts(trace).groupby("layer", as_index=False)
    table = hit.agg(
        steps=("step", "size"), unique=("unique", "mean"), expected=("expected", "mean"), read_bytes=("read_bytes", "sum")
    )
    table = table.merge(layer_kinds(trace.anatomy)[["layer", "experts", "top_k"]], on="layer")
    table["read_share"] = table["unique"] / table["experts"]
    table = table.merge(balance(trace), on="layer")
    recorded = trace.arrow("choices").num_rows > 0
    named = recorded and trace.arrow("tokens")["text"].null_count == 0
    alike = reuse(trace) if recorded else pd.DataFrame(columns=["layer", "reuse", "by_chance"], dtype=float)
    told = specialisation(trace) if named else pd.DataFrame(columns=["layer", "information"], dtype=float)
    table = table.merge(alike, on="layer", how="left").merge(told, on="layer", how="left")
    first = ["layer", "experts", "top_k", "steps", "unique", "expected", "read_bytes", "read_share"]
    return table[[*first, *(name for name in table if name not in first)]]
