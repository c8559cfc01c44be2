"""What a replayed method would have retained at each decoded token, beside the best possible."""

from __future__ import annotations

import plotly.graph_objects as go

from workbench.errors import UserError
from workbench.plots.replay_curves import NAMES
from workbench.plots.text import plain
from workbench.plots.theme import method_colours, style
from workbench.trace.replay import Replay


def replay_steps(replay: Replay, method: str, budget: float, layer: int | None = None, y: str = "mass_retained") -> go.Figure:
    """A line over the decoded tokens: the mean over heads, and over layers unless one is given.

    Args:
        replay: what was replayed.
        method: as in `Replay.point`.
        budget: one that was replayed.
        layer: a recorded layer; None: the mean over all.
        y: `mass_retained`, with the best possible dashed, or `output_error`.

    Raises:
        UserError: for another `y`, and for a method, budget or layer that was not replayed.
    """
    if y not in NAMES:
        raise UserError(f"Cannot draw {y!r} of a replay; choose {' or '.join(map(repr, NAMES))}.")
    layers = replay.about["layers"]
    if layer is not None and layer not in layers:
        raise UserError(f"Layer {layer} was not recorded; the layers here are {layers}.")
    point = replay.point(method, budget)
    chosen = slice(None) if layer is None else slice(layers.index(layer), layers.index(layer) + 1)
    colour = method_colours([point.setup])[point.setup]
    values = getattr(point, y)[chosen].mean((0, 1))
    figure = go.Figure()
    figure.add_scatter(y=values, mode="lines", name=plain(point.setup), line={"color": colour, "width": 2.5})
    if y == "mass_retained":
        best = point.oracle_mass[chosen].mean((0, 1))
        figure.add_scatter(y=best, mode="lines", name="best possible", line={"color": colour, "dash": "dash", "width": 1})
    figure.update_traces(hovertemplate="step %{x}<br>%{y:.4f}<extra></extra>")
    where = "mean over layers" if layer is None else f"layer {layer}"
    title = f"{NAMES[y].partition(' (')[0].capitalize()}<br><sub>{where}</sub>"
    return style(figure, title, "decoded token", NAMES[y])
