"""One look for all figures: the same colour for the same method, on light pages and on dark ones."""

from __future__ import annotations

from typing import Any

import plotly.graph_objects as go

from workbench.plots.look import DARK, LIGHT, Look

PALETTE = LIGHT.palette
DENSE_COLOUR = LIGHT.dense
MARK = LIGHT.mark
SHARE_SCALE = [[0.0, LIGHT.low], [1.0, LIGHT.high]]
MASS_MARK = "rgba(255, 255, 255, 0.9)"
"""On the dark end of that scale, which is the same on light and dark pages."""
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon")

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def colour_bar(title: str, **options: Any) -> dict:
    """A colour bar whose title stands beside it, since above it would cover the numbers of a low figure."""
    return {"title": {"text": title, "side": "right", "font": {"size": 12}}, "tickfont": {"size": 12}, **options}


HELD_HEATMAP = {
    "colorscale": SHARE_SCALE,
    "zmin": 0,
    "zmax": 1,
    "colorbar": colour_bar("share of kv heads", tickformat=".0%"),
}
MASS_HEATMAP = {"colorscale": "Cividis", "colorbar": colour_bar("log10 of the mass")}


def style(figure: go.Figure, title: str, x: str, y: str, height: int = 380) -> go.Figure:
    """Applies the common look and names the axes. Texts must have been made safe by `text.plain`."""
    figure.update_layout(
        template=_template(LIGHT),
        title={
            "text": title,
            "font": {"size": 16},
            "x": 0.01,
            "y": 1,
            "yanchor": "top",
            "pad": {"t": 26 if "<br>" in title else 12},
        },
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 13},
        xaxis_title=x,
        yaxis_title=y,
        height=height,
        margin={"l": 70, "r": 20, "t": 70 if "<br>" in title else 50, "b": 55},
        legend={"orientation": "h", "yref": "container", "y": 0, "yanchor": "bottom"},
    )
    return figure


def dark(figure: go.Figure) -> go.Figure:
    """A copy of one of our figures for a dark page: background, texts, grid, and every colour in its dark counterpart."""
    drawn = figure.to_plotly_json()
    copy = go.Figure(figure).update_layout(template=_template(DARK))
    copy.update_layout(_colours({key: part for key, part in drawn["layout"].items() if key != "template"}))
    for trace, part in zip(copy.data, drawn["data"], strict=True):
        trace.update(_colours(part))
    return copy


def _colours(part: Any) -> Any:
    """The colours in a part of a figure, at their places, as they are on a dark page."""
    if isinstance(part, dict):
        found = {
            key: _counterpart(each) if "color" in key and not isinstance(each, dict) else _colours(each)
            for key, each in part.items()
        }
        return {key: each for key, each in found.items() if each}
    if isinstance(part, list | tuple) and all(isinstance(each, dict) for each in part):
        return [_colours(each) for each in part]
    return None


def _counterpart(colour: Any) -> Any:
    """Of a colour, of a scale of them, or of a list."""
    if isinstance(colour, list | tuple):
        return [_counterpart(each) for each in colour]
    return _COUNTERPARTS.get(colour, colour) if isinstance(colour, str) else colour


_COUNTERPARTS = dict(zip(LIGHT.palette, DARK.palette, strict=True)) | {
    getattr(LIGHT, name): getattr(DARK, name)
    for name in ("paper", "ink", "grid", "mark", "dense", "low", "high", "high_under_text")
}


def _template(look: Look) -> go.layout.Template:
    """What figures take from their page. A few hundred bytes, since it travels with each of them."""
    line = {"gridcolor": look.grid, "linecolor": look.grid, "zerolinecolor": look.grid}
    axis = {"automargin": True, "zerolinewidth": 1.5, "title": {"standoff": 12}, **line}
    bar = {"type": "bar", "marker": {"line": {"color": look.paper, "width": 0.5}}}
    heatmap = {"type": "heatmap", "colorbar": {"outlinewidth": 0, "ticks": "", "thickness": 20}}
    return go.layout.Template(
        layout={
            "paper_bgcolor": look.paper,
            "plot_bgcolor": look.paper,
            "font": {"color": look.ink},
            "colorway": look.palette,
            "hovermode": "closest",
            "xaxis": axis,
            "yaxis": axis,
        },
        data={"bar": [bar], "heatmap": [heatmap]},
    )


def note(figure: go.Figure, sentence: str) -> None:
    """A sentence in the middle of a figure that has nothing to draw."""
    figure.add_annotation(text=sentence, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"size": 14})
    figure.update_xaxes(showticklabels=False).update_yaxes(showticklabels=False)


def method_of(label: str) -> str:
    """The method's name in a setup label: `h2o` of `h2o(budget=0.2)`."""
    return label.partition("(")[0]


def method_colours(labels: list[str]) -> dict[str, str]:
    """A colour for each setup label; setups of one method share theirs, and dense is grey in every figure."""
    places = _places(labels)
    names = {label: method_of(label) for label in labels}
    return {label: PALETTE[places[name] % len(PALETTE)] if name in places else DENSE_COLOUR for label, name in names.items()}


def method_symbol(method: str) -> str:
    """A marker symbol for a method, the same in every figure. Methods that share a colour differ in it."""
    place = _places([method]).get(method, -1)
    return SYMBOLS[(place + 1 + place // len(PALETTE)) % len(SYMBOLS)]


def _places(labels: list[str]) -> dict[str, int]:
    """The place of each method but dense: registered ones first, in the registry's order, then the others."""
    from workbench.methods import METHODS

    names = dict.fromkeys([*METHODS, *map(method_of, labels)])
    names.pop("dense", None)
    return {name: number for number, name in enumerate(names)}


def human_bytes(count: float) -> str:
    """A byte count for people: `1.5 MiB`."""
    for unit in _UNITS:
        if abs(count) < 1024 or unit == _UNITS[-1]:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.4g} {unit}"
        count /= 1024
    raise AssertionError


def human_seconds(seconds: float) -> str:
    """Seconds for people: `12.5 ms`."""
    for unit, size in (("s", 1.0), ("ms", 1e-3), ("µs", 1e-6)):
        if seconds >= size or unit == "µs":
            return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
    raise AssertionError
