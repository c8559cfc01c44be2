"""How the score holds out: one line a setup over the turns that follow its one compression."""

from __future__ import annotations

import plotly.graph_objects as go

from workbench.plots.text import plain
from workbench.plots.theme import method_colours, method_of, method_symbol, note, style
from workbench.trace.comparison import Comparison


def turn_scores(comparison: Comparison) -> go.Figure:
    """Mean score of the 1st, 2nd, ... turn; setups of one method share a colour and differ in their dashes."""
    table = comparison.turns
    colours = method_colours(list(table.index))
    dashes = ("solid", "dash", "dot", "dashdot", "longdash")
    drawn: dict[str, int] = {}
    figure = go.Figure()
    for setup, scores in table.iterrows():
        label = str(setup)
        method = method_of(label)
        drawn[method] = drawn.get(method, -1) + 1
        figure.add_scatter(
            x=table.columns,
            y=scores,
            mode="lines+markers",
            name=plain(label),
            line={"color": colours[label], "dash": dashes[drawn[method] % len(dashes)]},
            marker={"symbol": method_symbol(method), "size": 7},
            hovertemplate=f"{plain(label)}<br>turn %{{x}}<br>score %{{y:.3f}}<extra></extra>",
        )
    if not len(table.columns):
        note(figure, "This workload has no turns.")
    about = comparison.about
    style(figure, f"Score by turn: {plain(about['workload'])} on {plain(about['model'])}", "turn", "score (share right)")
    figure.update_yaxes(range=[-0.03, 1.03])
    return figure.update_xaxes(dtick=1)
