"""Which experts of a layer tokens are given together."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.cost.routing import co_activation as counts_of
from workbench.errors import UserError
from workbench.plots.text import plain
from workbench.plots.theme import SHARE_SCALE, colour_bar, style
from workbench.trace.trace import Trace

MOST = 256
"""Experts that are drawn: those given the most tokens, where a layer has more."""


def co_activation(trace: Trace, layer: int | None = None) -> go.Figure:
    """Heat map, experts by experts of one layer: of the tokens given the row's expert, the share given the column's too.

    Args:
        trace: one that was recorded with `routing="choices"`.
        layer: None is the first layer that has experts.

    Raises:
        UserError: without choices by token, and for a layer without experts.
    """
    experts = [each.index for each in trace.anatomy.layers if each.experts is not None]
    if not experts:
        raise UserError(f"{trace.anatomy.class_name} has no experts; draw those of a mixture of experts such as tiny-moe.")
    layer = experts[0] if layer is None else layer
    counts = counts_of(trace, layer)
    count = len(counts)
    tokens = counts.diagonal()
    drawn = np.sort(np.argsort(-tokens, kind="stable")[:MOST])
    with np.errstate(invalid="ignore"):
        share = counts / tokens[:, None]  # nothing is known of an expert without tokens
    np.fill_diagonal(share, np.nan)
    counts, share = counts[np.ix_(drawn, drawn)], share[np.ix_(drawn, drawn)]
    names = list(map(str, drawn))
    each = trace.anatomy.layers[layer].experts.top_k - 1
    even = each / (count - 1) if count > 1 else 0.0
    figure = go.Figure()
    figure.add_heatmap(
        z=share,
        x=names,
        y=names,
        customdata=np.dstack([counts, np.broadcast_to(tokens[drawn][:, None], counts.shape)]),
        colorscale=SHARE_SCALE,
        zmin=0,
        zmax=max(float(np.nanmax(share, initial=0.0)), min(1.0, 2 * even)) or 1.0,
        colorbar=colour_bar("share of the row's tokens", tickformat=".2~p"),
        hoverongaps=False,
        hovertemplate="expert %{y} was given %{customdata[1]:,} tokens<br>%{customdata[0]:,} of them (%{z:.1%}) "
        "went to expert %{x}, too<extra></extra>",
    )
    fewer = f", the {len(drawn)} busiest of {count} experts" if len(drawn) < count else ""
    title = (
        f"Experts chosen together in layer {layer}: {plain(trace.setup)}<br><sub>an even choice is {even:.1%} each{fewer}</sub>"
    )
    style(figure, title, "expert given, too", "expert", height=160 + 28 * min(len(drawn), 20))
    figure.update_xaxes(type="category", showgrid=False)
    return figure.update_yaxes(type="category", autorange="reversed", showgrid=False)
