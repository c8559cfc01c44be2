"""Which tokens the model looked at: attention mass by position and layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.cost.metrics import mass_by_position
from workbench.errors import UserError
from workbench.plots.cache_map import tokens_of
from workbench.plots.matrix import token_matrix
from workbench.plots.theme import MASS_HEATMAP, MASS_MARK
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
    texts, phases = tokens_of(trace, row, length)
    return token_matrix(
        grid,
        layers,
        texts,
        phases,
        title=f"Attention mass by position, step {step}",
        value="mass VALUE:.4f}",
        heatmap=MASS_HEATMAP,
        mark=MASS_MARK,
        logarithm=True,
    )
