"""One look for all figures: the same colour for the same method.

Colours are safe for the colour-blind: those of Okabe and Ito (2008), then of Paul Tol's muted scheme
(sronpersonalpages.nl/~pault).
"""

from __future__ import annotations

import plotly.graph_objects as go

PALETTE = (
    *("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442"),
    *("#332288", "#117733", "#999933", "#882255", "#CC6677", "#44AA99", "#DDCC77", "#88CCEE"),
)
DENSE_COLOUR = "#555555"
MARK = "#777777"
"""Lines and texts that say where something happened."""
KEPT_SCALE = [[0.0, "#F4F4F4"], [1.0, "#0072B2"]]
HELD_HEATMAP = {
    "colorscale": KEPT_SCALE,
    "zmin": 0,
    "zmax": 1,
    "colorbar": {"title": "share of<br>kv heads", "tickformat": ".0%"},
}
MASS_HEATMAP = {"colorscale": "Cividis", "colorbar": {"title": "log10<br>mass"}}
LOAD_SCALE = KEPT_SCALE
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon")

_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def style(figure: go.Figure, title: str, x: str, y: str, height: int = 380) -> go.Figure:
    """Applies the common look and names the axes."""
    figure.update_layout(
        template="plotly_white",
        title={"text": title, "font": {"size": 16}, "x": 0.01},
        font={"family": "Inter, Helvetica, Arial, sans-serif", "size": 13},
        xaxis_title=x,
        yaxis_title=y,
        height=height,
        margin={"l": 70, "r": 20, "t": 50, "b": 55},
        legend={"orientation": "h", "y": -0.22},
    )
    return figure


def note(figure: go.Figure, sentence: str) -> None:
    """A sentence in the middle of a figure that has nothing to draw."""
    figure.add_annotation(text=sentence, x=0.5, y=0.5, xref="paper", yref="paper", showarrow=False, font={"size": 14})


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
