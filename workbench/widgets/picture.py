"""A Plotly figure on the page that is changed in place, and of which only what changed is sent.

Plotly's own `FigureWidget` brings the whole library with every figure, 5 MB each; here it comes once a kernel. Arrays travel as
bytes, heat maps in single precision, and rows of texts that are alike (a token's name over every layer) once.
"""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import anywidget
import numpy as np
import plotly.graph_objects as go
from ipywidgets import Widget, widget_serialization
from plotly.offline import get_plotlyjs
from traitlets import Dict, Instance, List, Unicode


class _Library(Widget):
    """The source of plotly.js, which the first figure on a page evaluates."""

    source = Unicode().tag(sync=True)


_loaded: list[_Library] = []


def _library() -> _Library:
    """The one that is open, since all may have been closed."""
    if not _loaded or _loaded[0].comm is None:
        _loaded[:] = [_Library(source=get_plotlyjs())]
    return _loaded[0]


class Picture(anywidget.AnyWidget):
    """Shows `figure`; `draw` shows another one, in place and with the reader's zoom kept as its `uirevision` says."""

    _esm = Path(__file__).with_suffix(".js")
    library = Instance(Widget).tag(sync=True, **widget_serialization)
    traces = List().tag(sync=True)
    look = Dict().tag(sync=True)
    template = Dict().tag(sync=True)
    texts = List().tag(sync=True)

    def __init__(self, figure: go.Figure | None = None):
        self.figure = figure or go.Figure()
        super().__init__(library=_library(), **_encoded(self.figure))

    def draw(self, figure: go.Figure) -> None:
        """Shows another figure."""
        self.figure = figure
        with self.hold_sync():
            for name, value in _encoded(figure).items():
                setattr(self, name, value)


def _encoded(figure: go.Figure) -> dict[str, Any]:
    """The figure as its traits, what seldom changes apart: `{"row": i, "times": n}` is n times the i-th of the texts."""
    spec = figure.to_plotly_json()
    texts: list[list] = []
    traces = [{name: _compact(value, texts) for name, value in trace.items()} for trace in spec["data"]]
    look = _compact(spec["layout"], texts)
    return {"traces": traces, "template": look.pop("template", {}), "look": look, "texts": texts}


def _compact(value: Any, texts: list[list]) -> Any:
    """A value of a figure's JSON with arrays as bytes and equal rows once."""
    if isinstance(value, dict):
        if "bdata" in value:
            return _bytes(value)
        return {name: _compact(inner, texts) for name, inner in value.items()}
    if isinstance(value, np.ndarray):
        value = value.tolist()
    if isinstance(value, list | tuple) and len(value) > 1 and isinstance(value[0], list | tuple | np.ndarray):
        rows = [list(row) for row in value]
        if all(row == rows[0] for row in rows):
            texts.append(rows[0])
            return {"row": len(texts) - 1, "times": len(rows)}
    return value


def _bytes(array: dict[str, Any]) -> dict[str, Any]:
    """Plotly's array of base64 as one of bytes; matrices are colours on a screen, for which float32 is plenty."""
    raw = base64.b64decode(array["bdata"])
    if array["dtype"] == "f8" and "shape" in array:
        return {**array, "dtype": "f4", "bdata": np.frombuffer(raw).astype(np.float32).tobytes()}
    return {**array, "bdata": raw}
