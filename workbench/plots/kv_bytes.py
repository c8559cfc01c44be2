"""KV bytes over the steps of a run: really allocated, and by the budget."""

from __future__ import annotations

from collections.abc import Mapping

import plotly.graph_objects as go

from workbench.cost.metrics import cache_bytes
from workbench.plots.live_curve import evenly
from workbench.plots.text import plain
from workbench.plots.theme import method_colours, method_of, method_symbol, style
from workbench.trace.trace import Trace


def kv_bytes(traces: Trace | Mapping[str, Trace]) -> go.Figure:
    """Cache bytes after each forward call, solid as allocated and dotted as the budget promises. Long runs are thinned."""
    if isinstance(traces, Trace):
        traces = {traces.setup: traces}
    colours = method_colours(list(traces))
    figure = go.Figure()
    shown: set[str] = set()
    for label, trace in traces.items():
        held = evenly(cache_bytes(trace))
        for column, dash, width in (("physical_bytes", "solid", 2.5), ("nominal_bytes", "dot", 1.5)):
            kind = column.removesuffix("_bytes")
            figure.add_scatter(
                x=held["step"],
                y=held[column],
                mode="lines+markers",
                marker={"size": 7, "symbol": method_symbol(method_of(label))},
                name=plain(method_of(label)),
                legendgroup=plain(method_of(label)),
                showlegend=kind == "physical" and method_of(label) not in shown,
                line={"color": colours[label], "dash": dash, "width": width},
                hovertemplate=f"{plain(label)}, {kind}<br>step %{{x}}<br>%{{y:,}} bytes<extra></extra>",
            )
        shown.add(method_of(label))
    style(figure, "KV cache: allocated (solid) and by budget (dotted)", "forward call", "bytes")
    return figure.update_yaxes(rangemode="tozero", exponentformat="SI")
