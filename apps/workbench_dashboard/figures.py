"""Plotly figures that change in place. `st.plotly_chart` builds its chart anew whenever the figure differs, which flickers.

Here the figure goes to the Plotly that came with the Python package, by `Plotly.react`: what is zoomed stays zoomed, and a
figure that did not change is left alone.
"""

from __future__ import annotations

import functools
from pathlib import Path

import plotly
import plotly.graph_objects as go
import streamlit as st
from streamlit.components.v1 import declare_component

from workbench.plots.theme import dark

_NAME = "plotly"
_SCRIPT = f"/component/{__name__}.{_NAME}/plotly.min.js"

_JS = f"""
function loaded() {{
  window.workbenchPlotly ??= new Promise((resolve, reject) => {{
    const script = document.createElement("script");
    script.src = "{_SCRIPT}";
    script.onload = () => resolve(window.Plotly);
    script.onerror = () => reject(new Error("Plotly could not be loaded."));
    document.head.append(script);
  }});
  return window.workbenchPlotly;
}}

export default async function ({{ data, parentElement }}) {{
  const place = parentElement.querySelector(".workbench-figure");
  if (place.shown === data.figure) return;
  place.shown = data.figure;
  const figure = JSON.parse(data.figure);
  place.style.minHeight = `${{data.height}}px`;
  const plotly = await loaded();
  if (place.shown !== data.figure) return;
  await plotly.react(place, figure.data, {{ autosize: true, uirevision: "kept", ...figure.layout, height: data.height }},
                     {{ displaylogo: false, responsive: true }});
}}
"""

_COMPONENT = st.components.v2.component(
    "workbench_figure", html='<div class="workbench-figure"></div>', js=_JS, isolate_styles=False
)


@functools.cache
def _serve_plotly() -> None:
    """Declares a component that is never shown: it serves Plotly's own script. The server must be there to take it."""
    declare_component(_NAME, path=str(Path(plotly.__file__).parent / "package_data"))


def show(figure: go.Figure, key: str, height: int | None = None) -> None:
    """Draws a figure, or turns the one that has this key into it; on a dark page it is dark. `height` is in pixels."""
    if st.context.theme.type == "dark":
        figure = dark(figure)
    _serve_plotly()
    _COMPONENT(key=key, data={"figure": figure.to_json(), "height": height or figure.layout.height})
