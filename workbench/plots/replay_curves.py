"""What each method would have retained at each budget: one line a method, the best possible dashed, live points ringed."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from workbench.errors import UserError
from workbench.plots.look import LIGHT
from workbench.plots.text import plain
from workbench.plots.theme import MARK, method_colours, method_of, method_symbol, style
from workbench.trace.check import Check
from workbench.trace.replay import Replay

NAMES = {"mass_retained": "attention mass retained (share)", "output_error": "error of the attention output (share)"}
_BELOW = 6
"""Methods named below the figure; more of them stand beside it, since they would leave it no room."""
_DASHES = ("solid", "dot", "longdash", "dashdot")


def replay_curves(replay: Replay, check: Check | None = None, y: str = "mass_retained") -> go.Figure:
    """Lines over the budget as a share of the prompt; both are means over layers, heads and steps.

    Args:
        replay: what to draw.
        check: its live runs: their points are ringed, and what was measured shows on hover.
        y: `mass_retained`, with the best possible, or `output_error`.

    Raises:
        UserError: for another `y`.
    """
    if y not in NAMES:
        raise UserError(f"Cannot draw {y!r} of a replay; choose {' or '.join(map(repr, NAMES))}.")
    table = replay.curves()
    prompt = replay.about["prompt_tokens"]
    table["setup"] = [point.setup for point in replay.points]
    table["share"] = [each.budget / prompt if isinstance(each.budget, int) else each.budget for each in replay.points]
    colours = method_colours(list(table["method"]))
    figure = go.Figure()
    drawn: dict[str, int] = {}
    bounds: dict[tuple, list[str]] = {}
    for method, rows in table.groupby("method", sort=False):
        rows = rows.sort_values("share")
        name = str(method)
        variant = drawn[method_of(name)] = drawn.get(method_of(name), -1) + 1
        figure.add_scatter(
            x=rows["share"],
            y=rows[y],
            mode="lines+markers",
            name=plain(name),
            line={"color": colours[name], "dash": _DASHES[variant % len(_DASHES)]},
            marker={"symbol": method_symbol(method_of(name)), "size": 7},
            customdata=rows[["setup", "mass_retained", "output_error"]].assign(setup=rows["setup"].map(plain)),
            hovertemplate="%{customdata[0]}<br>mass %{customdata[1]:.4f}<br>output error %{customdata[2]:.4f}<extra></extra>",
        )
        best = tuple(zip(rows["share"].round(9), rows["oracle_mass"].round(6), strict=True))
        bounds.setdefault(best, []).append(name)
    many = len(table["method"].unique()) > _BELOW
    if y == "mass_retained":
        for number, (best, names) in enumerate(bounds.items()):
            figure.add_scatter(
                x=[share for share, _ in best],
                y=[mass for _, mass in best],
                mode="lines",
                name="best possible" if many else f"best possible: {plain(', '.join(names))}",
                legendgroup="best possible" if many else None,
                showlegend=not many or number == 0,
                line={"dash": "dash", "width": 1, "color": MARK if len(names) > 1 else colours[names[0]]},
                hovertemplate=f"best possible for {plain(', '.join(names))}<br>%{{y:.4f}}<extra></extra>",
            )
    title = f"Replay of {plain(replay.about['model'])}, {prompt} + {replay.about['steps']} tokens"
    if check is not None:
        _add_live(figure, table, check, y)
        title += f"<br><sub>{plain(check)}</sub>"
    style(figure, title, "budget (share of the prompt)", NAMES[y], height=520)
    if many:
        beside = {"orientation": "v", "x": 1.01, "y": 1, "yref": "paper", "yanchor": "top"}
        figure.update_layout(legend=beside, margin={"r": 190}, height=max(520, 150 + 30 * len(drawn)))
    return figure.update_layout(margin={"t": 70})


def _add_live(figure: go.Figure, table: pd.DataFrame, check: Check, y: str) -> None:
    """Rings around the points that were run live."""
    live = check.table
    places = table.set_index("setup").loc[live["setup"]]
    figure.add_scatter(
        x=places["share"],
        y=places[y],
        mode="markers",
        name="run live",
        marker={"symbol": "circle-open", "size": 15, "color": LIGHT.ink, "line": {"width": 2}},
        customdata=live[["setup", "live_kl", "live_top1", "kept_overlap"]].assign(setup=live["setup"].map(plain)),
        hovertemplate="%{customdata[0]}, run live<br>KL to dense %{customdata[1]:.4f} nats<br>top-1 %{customdata[2]:.1%}"
        "<br>kept as foretold %{customdata[3]:.1%}<extra></extra>",
    )
