"""A number for each layer and position as a heat map, with the tokens readable on hover: what maps of a text share."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.plots.look import LIGHT
from workbench.plots.text import plain, quoted
from workbench.plots.theme import note, style

MAX_COLUMNS = 2000
"""Wider maps are averaged into this many columns before they are drawn."""
_READABLE = 8
"""Columns of fewer tokens name all of them, wider ones the first."""
_APART = 0.08
"""Share of the width that two marks must be apart for both to be named."""


def token_matrix(
    values: np.ndarray,
    layers: Sequence[int],
    tokens: Sequence[str | None],
    phases: Sequence[str],
    *,
    title: str,
    value: str,
    heatmap: dict,
    mark: str = LIGHT.ink,
    logarithm: bool = False,
    missing: str = "Nothing was read yet.",
) -> go.Figure:
    """Draws `values`, `[layers, positions]`; a vertical line stands wherever a phase begins, such as a further turn.

    Args:
        values: one row a layer; more than `MAX_COLUMNS` positions are averaged.
        layers: the number of each row.
        tokens: the text of each position.
        phases: the phase each position came in.
        title: of the figure, made safe by the caller.
        value: what the hover text says of a number, with `VALUE` for where it stands.
        heatmap: colour scale, colour bar and range.
        mark: colour of the lines on the map.
        logarithm: whether colours follow log10 of the values, which must then not be negative.
        missing: the sentence in the middle if there are no positions.
    """
    length = values.shape[1]
    width = max(1, -(-length // MAX_COLUMNS))
    starts = np.arange(0, length, width)
    figure = go.Figure()
    if length:
        reduced = np.add.reduceat(values, starts, axis=1) / np.diff([*starts, length])
        names = [names_of(tokens[start : start + width]) for start in starts]
        figure.add_heatmap(
            z=np.log10(np.maximum(reduced, 1e-6)) if logarithm else reduced,
            x=starts,
            y=np.array(layers),
            text=[names] * len(values),
            customdata=reduced if logarithm else None,
            hovertemplate="position %{x}, layer %{y}<br>%{text}<br>"
            + value.replace("VALUE", "%{customdata" if logarithm else "%{z")
            + "<extra></extra>",
            **heatmap,
        )
    else:
        note(figure, missing)
    mark_phases(figure, phases, mark)
    style(figure, title, "position in the text", "layer", height=120 + 34 * min(len(layers), 20))
    return figure.update_yaxes(autorange="reversed", dtick=1 if len(layers) <= 20 else None)


def names_of(tokens: Sequence[str | None]) -> str:
    """Tokens as a hover text: all of them if they are few, else the first."""
    shown = tokens if len(tokens) < _READABLE else tokens[:1]
    return " ".join(map(quoted, shown)) + (" …" if len(shown) < len(tokens) else "")


def mark_phases(figure: go.Figure, phases: Sequence[str], inside: str) -> None:
    """A line where a phase begins, with a tick above the map, named where there is room."""
    free = 0.0
    for position in range(1, len(phases)):
        if phases[position] == phases[position - 1]:
            continue
        x = position - 0.5
        figure.add_shape(type="line", x0=x, x1=x, y0=0, y1=1, yref="paper", line={"width": 1, "dash": "dot", "color": inside})
        figure.add_shape(type="line", x0=x, x1=x, y0=1, y1=1.06, yref="paper", line={"width": 1, "color": LIGHT.mark})
        if position >= free:
            figure.add_annotation(
                x=x, y=1, yref="paper", yanchor="bottom", xanchor="left", showarrow=False, font={"size": 11},
                text=plain(phases[position]),
            )  # fmt: skip
            free = position + _APART * len(phases)
