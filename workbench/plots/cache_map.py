"""Which positions a method kept, layer by layer, with the tokens readable on hover."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.plots.theme import KEPT_SCALE, style
from workbench.trace.trace import Trace

MAX_COLUMNS = 2000
"""Wider maps are averaged into this many columns before they are drawn."""


def kept_share(trace: Trace, row: int = 0) -> np.ndarray:
    """`[layers, positions]`: share of a layer's kv heads that still hold each token at the end of the run."""
    anatomy = trace.anatomy
    tokens = trace.table("tokens")
    length = int(tokens.loc[tokens["row"] == row, "position"].max()) + 1
    share = np.ones((anatomy.num_layers, length))
    evictions = trace.table("evictions")
    gone = evictions[evictions["row"] == row].drop_duplicates(["layer", "head", "position"])
    for (layer, position), count in gone.groupby(["layer", "position"]).size().items():
        share[layer, position] -= count / anatomy.layers[layer].attention.num_kv_heads
    for layer in anatomy.layers:
        if layer.attention.window is not None:
            share[layer.index, : max(0, length - layer.attention.window + 1)] = 0.0
    return share


def cache_map(trace: Trace, row: int = 0) -> go.Figure:
    """Heat map of what is held at the end of a run: layers by positions, dark where every kv head holds the token."""
    share = kept_share(trace, row)
    num_layers, length = share.shape
    tokens = trace.table("tokens")
    texts = tokens[tokens["row"] == row].drop_duplicates("position").set_index("position")["text"]
    labels = [repr(texts.get(position) or "") for position in range(length)]
    width = -(-length // MAX_COLUMNS)
    starts = range(0, length, width)
    columns = [" ".join(labels[start : start + width]) if width < 8 else labels[start] for start in starts]
    reduced = np.stack([share[:, start : start + width].mean(1) for start in starts], 1)
    figure = go.Figure(
        go.Heatmap(
            z=reduced,
            x=list(starts),
            y=list(range(num_layers)),
            customdata=np.tile(np.array(columns, dtype=object), (num_layers, 1)),
            colorscale=KEPT_SCALE,
            zmin=0,
            zmax=1,
            colorbar={"title": "share of<br>kv heads", "tickformat": ".0%"},
            hovertemplate="position %{x}, layer %{y}<br>%{customdata}<br>held by %{z:.0%} of kv heads<extra></extra>",
        )
    )
    style(
        figure,
        f"Tokens held at the end: {trace.setup}",
        "position in the text",
        "layer",
        height=120 + 34 * min(num_layers, 20),
    )
    return figure.update_yaxes(autorange="reversed", dtick=1 if num_layers <= 20 else None)
