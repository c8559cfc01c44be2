"""How sure the routers were, layer by layer."""

from __future__ import annotations

import plotly.graph_objects as go

from workbench.cost.routing import confidence
from workbench.errors import UserError
from workbench.plots.text import plain
from workbench.plots.theme import PALETTE, style
from workbench.trace.trace import Trace

OF = {
    "top_weight": "largest weight given",
    "margin": "margin (logits)",
    "entropy": "entropy (1: all experts alike)",
}
"""What can be drawn, and its axis."""
_ABOUT = {
    "top_weight": "of each token's experts, the one that counts most",
    "margin": "how far the last expert chosen was ahead of the best one left out",
    "entropy": "of the router's softmax over all experts, in units of log E",
}


def router_confidence(trace: Trace, of: str = "top_weight") -> go.Figure:
    """Boxes over tokens, one a layer: quartiles, with whiskers from the 5th to the 95th percentile.

    Args:
        trace: one recorded with `routing="choices"`, or `"logits"` for the margin and the entropy.
        of: `top_weight`, `margin` or `entropy`.

    Raises:
        UserError: for another `of`, and where the trace does not hold what it takes.
    """
    if of not in OF:
        raise UserError(f"Cannot draw {of!r} of a router; choose {', '.join(map(repr, OF))}.")
    table = confidence(trace).dropna(subset=[of])
    if table.empty:
        raise UserError(f'This trace has no logits of its routers, which {of!r} follows from; record it with routing="logits".')
    lines = table.groupby("layer")[of].quantile([0.05, 0.25, 0.5, 0.75, 0.95]).unstack()
    figure = go.Figure()
    figure.add_box(
        x=list(map(str, lines.index)),
        lowerfence=lines[0.05],
        q1=lines[0.25],
        median=lines[0.5],
        q3=lines[0.75],
        upperfence=lines[0.95],
        marker={"color": PALETTE[0]},
        name="tokens",
    )
    about = f"{_ABOUT[of]}; boxes are quartiles over tokens, whiskers 5% to 95%"
    title = f"How sure the routers are: {plain(trace.setup)}<br><sub>{about}</sub>"
    style(figure, title, "layer", OF[of], height=380)
    figure.update_xaxes(type="category")
    return figure.update_yaxes(rangemode="tozero")
