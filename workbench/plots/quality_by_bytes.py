"""Quality against the FFN weights read a token: one panel for each number of rows in flight, one point a setup."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go
from plotly.subplots import make_subplots

from workbench.errors import UserError
from workbench.plots.text import plain
from workbench.plots.theme import method_colours, method_of, method_symbol, style

_QUALITY = {"kl_to_dense": "KL to dense (nats a token)", "nll": "negative log-likelihood (nats a token)"}


def quality_by_bytes(found: pd.DataFrame, y: str = "kl_to_dense", title: str = "") -> go.Figure:
    """A figure of what `workbench.experiments.in_flight.quality_in_flight` found.

    Raises UserError for a column that measures no quality, and for a table without rows.
    """
    if y not in _QUALITY:
        raise UserError(f"Cannot draw {y!r} as quality; choose {' or '.join(_QUALITY)}.")
    if found.empty:
        raise UserError("There is nothing to draw: no setup was run.")
    counts = list(found["rows"].unique())
    panels = [f"{count} row{'s' if count > 1 else ''} in flight" for count in counts]
    figure = make_subplots(1, len(counts), shared_yaxes=True, subplot_titles=panels, horizontal_spacing=0.04)
    colours = method_colours(list(found["setup"]))
    for column, count in enumerate(counts, 1):
        of_count = found[found["rows"] == count]
        for method, rows in of_count.groupby(of_count["setup"].map(method_of), sort=False):
            rows = rows.sort_values("read_bytes")
            figure.add_scatter(
                x=rows["read_bytes"],
                y=rows[y],
                mode="lines+markers",
                name=plain(method),
                legendgroup=plain(method),
                showlegend=column == 1,
                line={"dash": "dot", "width": 1, "color": colours[rows["setup"].iloc[0]]},
                marker={"size": 10, "symbol": method_symbol(str(method))},
                customdata=rows[["setup", "resident_bytes"]].assign(setup=rows["setup"].map(plain)),
                hovertemplate="%{customdata[0]}<br>%{x:.3s}B read a token<br>" + y + " %{y:.3f}<br>%{customdata[1]:.3s}B held"
                "<extra></extra>",
                row=1,
                col=column,
            )
    figure.update_xaxes(type="log", tickformat=".3~s", ticksuffix="B", dtick="D2")
    heading = f"Quality against FFN weights read<br><sub>{plain(title)}</sub>" if title else "Quality against FFN weights read"
    style(figure, heading, "weights read a token (modelled)", _QUALITY[y], height=430)
    figure.update_xaxes(title_text="weights read a token (modelled)")
    return figure
