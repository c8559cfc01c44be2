"""How the seconds of a run under each method compare with a dense run, over the context."""

from __future__ import annotations

import plotly.graph_objects as go

from workbench.cost.crossover import DENSE, CrossOver
from workbench.errors import UserError
from workbench.plots.text import plain
from workbench.plots.theme import MARK, method_colours, method_of, method_symbol, style

_NAMES = {"total_s": "the whole run", "prefill_s": "the prefill", "step_s": "a decode step"}


def cross_over(found: CrossOver, y: str = "total_s") -> go.Figure:
    """Lines of seconds as a share of the dense run's, predicted; a method pays where its line is below 1.

    Args:
        found: what to draw.
        y: `total_s`, `prefill_s` or `step_s`.

    Raises:
        UserError: for another `y`.
    """
    if y not in _NAMES:
        raise UserError(f"Cannot draw {y!r} of a cross-over; choose {', '.join(map(repr, _NAMES))}.")
    dense = found.table[found.table["method"] == DENSE].set_index("context")[y]
    labels = [str(label) for label in found.table["method"].unique() if label != DENSE]
    setups = {label: label.replace(":", "(", 1) for label in labels}
    colours = method_colours(list(setups.values()))
    figure = go.Figure()
    figure.add_scatter(
        x=[dense.index.min(), dense.index.max()],
        y=[1, 1],
        mode="lines",
        name=DENSE,
        line={"color": MARK, "dash": "dash", "width": 1.5},
        hoverinfo="skip",
    )
    for label, setup in setups.items():
        rows = found.table[found.table["method"] == label].set_index("context")
        figure.add_scatter(
            x=rows.index,
            y=rows[y] / dense,
            mode="lines+markers",
            name=plain(label),
            line={"color": colours[setup]},
            marker={"symbol": method_symbol(method_of(setup)), "size": 7},
            customdata=rows[[y]].assign(dense=dense),
            hovertemplate=f"{plain(label)}<br>%{{x:,}} tokens<br>%{{customdata[0]:.4g}} s, dense %{{customdata[1]:.4g}} s"
            "<br>%{y:.3f} of dense<extra></extra>",
        )
    figure.update_xaxes(type="log", exponentformat="none", tickformat=",")
    about = found.about
    where = f"{plain(about['model'])} on {plain(about['hardware'])}, {plain(about['dtype'])}, batch {about['batch']}"
    title = f"Time of {_NAMES[y]} beside dense (predicted)<br><sub>{where}, {about['new_tokens']:,} new tokens</sub>"
    return style(figure, title, "context (tokens)", "share of the dense run's seconds", height=440)
