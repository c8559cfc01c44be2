"""Which positions a method kept, layer by layer, with the tokens readable on hover."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.plots.matrix import token_matrix
from workbench.plots.text import plain
from workbench.plots.theme import HELD_HEATMAP
from workbench.trace.trace import Trace


def kept_share(trace: Trace, row: int = 0) -> np.ndarray:
    """`[layers, positions]`: share of a layer's kv heads that still hold each token at the end of the run."""
    anatomy = trace.anatomy
    tokens = trace.table("tokens")
    length = int(tokens.loc[tokens["row"] == row, "position"].max()) + 1
    evictions = trace.table("evictions")
    gone = evictions[(evictions["row"] == row) & (evictions["position"] < length)].drop_duplicates(
        ["layer", "head", "position"]
    )
    heads = np.array([layer.attention.num_kv_heads for layer in anatomy.layers])[gone["layer"]]
    share = np.ones((anatomy.num_layers, length))
    np.subtract.at(share, (gone["layer"], gone["position"]), np.where(gone["head"] < 0, 1.0, 1 / heads))
    share = share.clip(0.0)
    for layer in anatomy.layers:
        if layer.attention.window is not None:
            share[layer.index, : max(0, length - layer.attention.window + 1)] = 0.0
    return share


def cache_map(trace: Trace, row: int = 0) -> go.Figure:
    """Heat map of what is held at the end of a run: layers by positions, dark where every kv head holds the token."""
    share = kept_share(trace, row)
    texts, phases = tokens_of(trace, row, share.shape[1])
    return token_matrix(
        share,
        range(len(share)),
        texts,
        phases,
        title=f"Tokens held at the end: {plain(trace.setup)}",
        value="held by VALUE:.0%} of kv heads",
        heatmap=HELD_HEATMAP,
    )


def tokens_of(trace: Trace, row: int, length: int) -> tuple[list[str | None], list[str]]:
    """Text and phase of each position of a row; "" where the trace names none."""
    tokens = trace.table("tokens")
    tokens = tokens[tokens["row"] == row].drop_duplicates("position").set_index("position").reindex(range(length))
    return list(tokens["text"].fillna("")), list(tokens["phase"].ffill().fillna(""))
