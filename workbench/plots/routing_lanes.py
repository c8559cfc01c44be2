"""Which experts every token went to, layer by layer, over the text."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.cost.choices import choices
from workbench.errors import UserError
from workbench.plots.cache_map import tokens_of
from workbench.plots.look import LIGHT
from workbench.plots.matrix import MAX_COLUMNS, mark_phases, names_of
from workbench.plots.text import plain, quoted
from workbench.plots.theme import PALETTE, colour_bar, style
from workbench.trace.trace import Trace

_NUMBERED = 48
"""Tokens up to which each cell has room for its expert's number."""
_TICKS = 8
"""Experts that are named beside the colours."""
_LABEL = 12
"""Characters of a token below the axis."""
_NAMED = 12
"""Experts of one token that are named on hover."""


def routing_lanes(trace: Trace, row: int = 0, positions: range | None = None) -> go.Figure:
    """Heat map, layers by tokens: the colour is the expert with the largest weight; on hover all of a token's experts.

    Args:
        trace: one that was recorded with `routing="choices"`.
        row: of the batch.
        positions: the part of the text to draw; None is all. Of more than `MAX_COLUMNS` tokens several share a column, which
            shows the expert that most of them went to.

    Raises:
        UserError: without choices by token, and if none lies in this row or part of the text.
    """
    every = choices(trace)
    table = every[every["row"] == row]
    if table.empty:
        rows = ", ".join(map(str, sorted(every["row"].unique())[:8]))
        raise UserError(f"No token of row {row} was routed; choose one of {rows}.")
    if positions is not None:
        table = table[table["position"].between(positions.start, positions.stop - 1)]
    if table.empty:
        raise UserError(f"No token at {positions} was routed; the text has {int(every['position'].max()) + 1} positions.")
    first, stop = int(table["position"].min()), int(table["position"].max()) + 1
    width = -(-(stop - first) // MAX_COLUMNS)
    starts = range(first, stop, width)
    layers = sorted(map(int, table["layer"].unique()))
    favourite, said = _cells(table, layers, first, width, len(starts))
    texts, phases = tokens_of(trace, row, stop)
    count = max(trace.anatomy.layers[layer].experts.num_experts for layer in layers)
    few = len(starts) <= _NUMBERED
    figure = go.Figure()
    figure.add_heatmap(
        z=favourite,
        x=[_label(start, texts[start]) for start in starts],
        y=list(range(len(layers))),
        text=[[names_of(texts[start : min(stop, start + width)]) for start in starts]] * len(layers),
        customdata=said,
        hovertemplate="position %{x}, layer %{y}<br>%{text}<br>%{customdata}<extra></extra>",
        texttemplate="%{z}" if few else None,
        xgap=int(few),
        ygap=2,
        zmin=-0.5,
        zmax=count - 0.5,
        colorscale=_steps(count),
        showscale=count <= len(PALETTE),
        colorbar=colour_bar("expert", tickvals=list(range(0, count, -(-count // _TICKS)))),
    )
    mark_phases(figure, [phases[start] for start in starts], LIGHT.ink)
    about = "the colour is the expert with the largest weight"
    about += f"; experts {len(PALETTE)} apart share one" if count > len(PALETTE) else ""
    about += f"; {width} tokens share a column" if width > 1 else ""
    title = f"Experts by token: {plain(trace.setup)}<br><sub>{about}</sub>"
    style(figure, title, "token", "layer", height=230 + 34 * min(len(layers), 20))
    figure.update_xaxes(type="category", showgrid=False)
    return figure.update_yaxes(
        autorange="reversed", tickvals=list(range(len(layers))), ticktext=list(map(str, layers)), showgrid=False
    )


def _cells(
    table: pd.DataFrame, layers: Sequence[int], first: int, width: int, columns: int
) -> tuple[np.ndarray, list[list[str]]]:
    """`[M, columns]` the expert that gives a cell its colour, NaN where there is none, and what a cell says on hover."""
    drawn = pd.DataFrame(
        {
            "place": table["layer"].map({layer: place for place, layer in enumerate(layers)}),
            "column": (table["position"] - first) // width,
            "given": [_given(*each) for each in zip(table["experts"], table["weights"], strict=True)],
        }
    )
    drawn["expert"] = [given[0][0] if given else np.nan for given in drawn["given"]]
    shape = (len(layers), columns)
    favourite, said = np.full(shape, np.nan), np.full(shape, "", dtype=object)
    if width == 1:
        place, column = drawn["place"].to_numpy(), drawn["column"].to_numpy()
        favourite[place, column] = drawn["expert"]
        said[place, column] = [_named(given) for given in drawn["given"]]
    else:
        votes = drawn.groupby(["place", "column", "expert"], as_index=False).size().sort_values("size")
        votes = votes.assign(of=votes.groupby(["place", "column"])["size"].transform("sum")).drop_duplicates(
            ["place", "column"], keep="last"
        )
        place, column = votes["place"].to_numpy(), votes["column"].to_numpy()
        favourite[place, column] = votes["expert"]
        said[place, column] = [f"expert {int(each.expert)}, for {each.size} of {each.of} tokens" for each in votes.itertuples()]
    return favourite, said.tolist()


def _given(experts: Sequence[int], weights: Sequence[float]) -> list[tuple[int, float]]:
    """A token's experts with their weights, the largest first; those that dropped it are left out."""
    known = [(int(expert), float(weight)) for expert, weight in zip(experts, weights, strict=True) if expert >= 0]
    return sorted(known, key=lambda each: -each[1])


def _named(given: Sequence[tuple[int, float]]) -> str:
    more = " …" if len(given) > _NAMED else ""
    return ", ".join(f"expert {expert}: {weight:.2f}" for expert, weight in given[:_NAMED]) + more if given else "dropped"


def _steps(count: int) -> list[list]:
    """A colour scale of one even step an expert; colours come again where there are more experts than colours."""
    colours = [PALETTE[expert % len(PALETTE)] for expert in range(count)]
    return [[place / count, colour] for expert, colour in enumerate(colours) for place in (expert, expert + 1)]


def _label(position: int, token: str | None) -> str:
    """What stands below a column; a token that is not known has its position alone."""
    if not token:
        return str(position)
    return f"{position} {quoted(token if len(token) <= _LABEL else f'{token[: _LABEL - 1]}…')}"
