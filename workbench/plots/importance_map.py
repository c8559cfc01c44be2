"""Which tokens the model looked at: attention mass by position and layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.cost.metrics import mass_by_position
from workbench.errors import UserError
from workbench.plots.cache_map import MAX_COLUMNS
from workbench.plots.theme import style
from workbench.trace.trace import Trace


def importance_map(trace: Trace, step: int | None = None, row: int = 0) -> go.Figure:
    """Heat map of the mean attention mass a query gave each position, by layer, at one step (default: the first).

    Raises UserError if the trace holds no importance.
    """
    table = trace.table("importance")
    table = table[table["row"] == row]
    if table.empty:
        raise UserError("This trace holds no importance; record it with importance='window' or 'full'.")
    step = int(table["step"].min()) if step is None else step
    table = table[table["step"] == step]
    if table.empty:
        raise UserError(f"The trace holds no importance for step {step}.")
    layers = sorted(table["layer"].unique())
    length = int((table["start"] + table["length"]).max())
    grid = np.zeros((len(layers), length))
    for number, layer in enumerate(layers):
        of_layer = table[table["layer"] == layer]
        for line in of_layer.itertuples():
            grid[number, line.start : line.start + line.length] += mass_by_position(line) / line.window / len(of_layer)
    width = -(-length // MAX_COLUMNS)
    starts = range(0, length, width)
    reduced = np.stack([grid[:, start : start + width].sum(1) for start in starts], 1)
    figure = go.Figure(
        go.Heatmap(
            z=np.log10(np.maximum(reduced, 1e-6)),
            x=list(starts),
            y=layers,
            customdata=reduced,
            colorscale="Cividis",
            colorbar={"title": "log10<br>mass"},
            hovertemplate="position %{x}, layer %{y}<br>mass %{customdata:.4f}<extra></extra>",
        )
    )
    style(
        figure,
        f"Attention mass by position, step {step}",
        "position in the text",
        "layer",
        height=120 + 34 * min(len(layers), 20),
    )
    return figure.update_yaxes(autorange="reversed")
