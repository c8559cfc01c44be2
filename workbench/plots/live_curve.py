"""One quantity over the forward calls of runs that go on: the curve bends where the method was changed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.errors import UserError
from workbench.plots.text import plain
from workbench.plots.theme import MARK, method_colours, method_of, method_symbol, note, style
from workbench.trace.snapshot import Snapshot

MAX_POINTS = 600
"""Longer lines are thinned evenly to about so many points; the first, the last and those at a swap stay."""
_DASHES = ("solid", "dash", "dashdot", "longdash", "longdashdot")
_ROW, _ROWS = 14, 4
"""Pixels between labels of swaps, and how many rows of them there are at most."""
_MARKERS = 12
"""Points of a line that carry its method's symbol, about."""


@dataclass(frozen=True)
class _Quantity:
    """What a column is called, and how it is drawn."""

    title: str
    axis: str
    of_decode: bool = False
    """Whether only decode steps are drawn, since reading the prompt would dwarf them."""
    scale: float = 1.0
    running: bool = False
    """Whether the mean up to each step is drawn."""
    format: str = ",.4g"


_DECODE = "decode steps only"
_KV = _Quantity("KV cache: allocated (solid) and by budget (dotted)", "bytes", format=",.0f")
_QUANTITIES = {
    "context": _Quantity("Tokens in the context", "tokens", format=",.0f"),
    "duration_ns": _Quantity("Time of a token, measured", "ms a token", of_decode=True, scale=1e-6),
    "kv_physical_bytes": _KV,
    "kv_nominal_bytes": _KV,
    "flops": _Quantity("FLOPs of a token, modelled", "FLOPs a token", of_decode=True, format=".4s"),
    "moved_bytes": _Quantity("Bytes moved for a token, modelled (fused)", "bytes a token", of_decode=True, format=".4s"),
    "logprob": _Quantity("Log-probability of each token", "nats"),
    "entropy": _Quantity("Entropy of the next token", "nats"),
    "kl_to_dense": _Quantity("KL from the dense run that follows", "nats a token"),
    "agrees": _Quantity("Likeliest token as in the dense run", "share so far", running=True, format=".1%"),
}


def live_curve(snapshots: Mapping[str, Snapshot], column: str = "kv_physical_bytes") -> go.Figure:
    """A line a run over its forward calls, in the colour of the method then in force; a mark and a label where one took over.

    KV bytes show what is allocated (solid) and what the budget promises (dotted). FLOPs, moved bytes and durations are those
    of decode steps. Runs differ in their dashes. Runs without a step give empty axes.

    Args:
        snapshots: runs by name, as `Player.snapshots` has them.
        column: a column of `Snapshot.history` with numbers.

    Raises:
        UserError: for another column.
    """
    if column not in _QUANTITIES:
        raise UserError(f"Cannot draw {column!r} of a run; choose one of {', '.join(_QUANTITIES)}.")
    quantity = _QUANTITIES[column]
    columns = {"kv_physical_bytes": "allocated", "kv_nominal_bytes": "by budget"} if quantity is _KV else {column: ""}
    colours = method_colours([setup for each in snapshots.values() for setup in each.history["setup"].unique()])
    figure = go.Figure()
    for number, (name, snapshot) in enumerate(snapshots.items()):
        for each, kind in columns.items():
            points = _points(snapshot.history, each, quantity)
            dotted = each == "kv_nominal_bytes"
            line = {"dash": "dot" if dotted else _DASHES[number % len(_DASHES)], "width": 1.5 if dotted else 2.5}
            _add_run(figure, name, len(snapshots) > 1, points, kind, line, colours, quantity)
    if not figure.data:
        why = "Nothing was run yet."
        if any(len(each.history) for each in snapshots.values()):
            why = "No dense run follows." if column in ("kl_to_dense", "agrees") else "No token was decoded yet."
        note(figure, why)
    title = quantity.title + (f"<br><sub>{_DECODE}</sub>" if quantity.of_decode else "")
    style(figure, title, "forward call", quantity.axis)
    figure.update_yaxes(rangemode="tozero" if quantity.of_decode or quantity is _KV else "normal", exponentformat="SI")
    if quantity.running:
        figure.update_yaxes(tickformat=".0%", range=[0, 1.03])
    _mark_swaps(figure, snapshots)
    return figure.update_layout(uirevision=column)


def _points(history: pd.DataFrame, column: str, quantity: _Quantity) -> pd.DataFrame:
    """The `step`, `setup` and `value` of what is drawn of a run, thinned."""
    rows = history[history["phase"] == "decode"] if quantity.of_decode else history
    rows = rows[rows[column].notna()]
    value = rows[column].astype(float) * quantity.scale
    points = pd.DataFrame(
        {
            "step": rows["step"].astype(int),
            "setup": rows["setup"],
            "value": value.expanding().mean() if quantity.running else value,
        }
    )
    return evenly(points, np.flatnonzero((points["setup"] != points["setup"].shift()).to_numpy()))


def evenly(points: pd.DataFrame, stay: Sequence[int] = ()) -> pd.DataFrame:
    """At most `MAX_POINTS` rows evenly from the first to the last, and those that stay whatever their number."""
    if len(points) <= MAX_POINTS:
        return points
    even = np.linspace(0, len(points) - 1, MAX_POINTS).round().astype(int)
    return points.iloc[np.union1d(even, stay).astype(int)]


def _add_run(figure, name, several, points, kind, line, colours, quantity) -> None:
    """A line a stretch under one setup; each begins where the one before ends."""
    shown = {trace.legendgroup for trace in figure.data}
    starts = np.flatnonzero((points["setup"] != points["setup"].shift()).to_numpy())
    for start, stop in pairwise([*starts, len(points)]):
        stretch = points.iloc[max(0, start - 1) : stop]
        label = points["setup"].iloc[start]
        group = plain(f"{name}: {method_of(label)}" if several else method_of(label))
        every = -(-len(points) // _MARKERS)
        symbols = [8 if number % every == 0 else 0 for number in range(len(stretch))]
        figure.add_scatter(
            x=stretch["step"].to_numpy(),
            y=stretch["value"].to_numpy(),
            mode="lines+markers",
            name=group,
            legendgroup=group,
            showlegend=group not in shown,
            line=line | {"color": colours[label]},
            marker={"size": symbols, "symbol": method_symbol(method_of(label)), "color": colours[label], "line": {"width": 0}},
            hovertemplate=f"{plain(name)}: {plain(label)}<br>call %{{x}}<br>%{{y:{quantity.format}}} {quantity.axis}"
            f"{f', {kind}' if kind else ''}<extra></extra>",
        )
        shown.add(group)


def _mark_swaps(figure: go.Figure, snapshots: Mapping[str, Snapshot]) -> None:
    """A line where a setup took over, and its label above the figure, in rows so that close ones do not meet."""
    last = max((int(each.history["step"].max()) for each in snapshots.values() if len(each.history)), default=0)
    swaps = dict.fromkeys(swap for each in snapshots.values() for swap in each.swaps)
    for number, (step, label) in enumerate(swaps):
        figure.add_vline(x=step, line={"width": 1, "dash": "dot", "color": MARK})
        figure.add_annotation(
            x=step, y=1, yref="paper", yanchor="bottom", yshift=_ROW * (number % _ROWS), text=plain(label),
            xanchor="left" if step < last / 2 else "right", showarrow=False, font={"size": 11},
        )  # fmt: skip
    figure.update_layout(margin={"t": figure.layout.margin.t + _ROW * min(len(swaps), _ROWS)})
