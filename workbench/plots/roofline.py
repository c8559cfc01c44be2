"""The roofline of a device, with the components of a predicted run as points."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.cost.flops import COMPONENTS
from workbench.cost.roofline import Prediction
from workbench.plots.look import LIGHT
from workbench.plots.text import plain
from workbench.plots.theme import MARK, PALETTE, SYMBOLS, style

_MARGIN = 4
"""How far the roof is drawn beyond the outermost point and the ridge, as a factor."""
_SMALLEST, _LARGEST = 7, 30


def roofline(prediction: Prediction) -> go.Figure:
    """Log-log: FLOP/s over FLOPs a byte, a colour a component, a symbol a phase; the area is the share of the phase's time.

    Points lie on the roof, or below it on a machine whose rates were measured. Components without FLOPs (norms, cache,
    embedding) have no place here and are left out.
    """
    hardware, dtype = prediction.hardware, prediction.dtype
    table = prediction.table
    share = table["predicted_s"] / table.groupby("phase")["predicted_s"].transform("sum")
    points = table.assign(share=share)[table["flops"] > 0].dropna(subset="intensity")
    ridge, peak = hardware.ridge(dtype), hardware.peak(dtype)
    ends = [min(points["intensity"].min(), ridge) / _MARGIN, max(points["intensity"].max(), ridge) * _MARGIN]
    figure = go.Figure()
    figure.add_scatter(
        x=[ends[0], ridge, ends[1]],
        y=[ends[0] * hardware.bandwidth, peak, peak],
        mode="lines",
        name=f"bound of {plain(hardware.name)}",
        line={"color": MARK, "width": 2},
        hovertemplate=f"ridge at {ridge:.3g} FLOPs a byte<extra></extra>",
    )
    symbols = dict(zip(prediction.phases["phase"], SYMBOLS, strict=False))
    for component, rows in points.groupby("component", sort=False):
        figure.add_scatter(
            x=rows["intensity"],
            y=rows["flops"] / rows["predicted_s"],
            mode="markers",
            name=str(component),
            marker={
                "size": _SMALLEST + (_LARGEST - _SMALLEST) * np.sqrt(rows["share"]),
                "color": PALETTE[COMPONENTS.index(str(component)) % len(PALETTE)],
                "symbol": rows["phase"].map(symbols),
                "line": {"width": 1, "color": LIGHT.paper},
            },
            customdata=rows[["phase", "bound", "predicted_s", "share"]],
            hovertemplate=f"%{{customdata[0]}}, {component}: bound by %{{customdata[1]}}<br>%{{x:.3g}} FLOPs a byte<br>"
            "%{y:.3g} FLOP/s<br>%{customdata[2]:.3g} s predicted, %{customdata[3]:.1%} of the phase<extra></extra>",
        )
    figure.update_xaxes(type="log", exponentformat="power")
    figure.update_yaxes(type="log", exponentformat="power")
    legend = ", ".join(f"{symbol}: {phase}" for phase, symbol in symbols.items())
    title = f"Roofline: {plain(prediction.model)} on {plain(hardware.label)}, {dtype}"
    title += f"<br><sub>{legend}; area: share of the phase's time</sub>"
    return style(figure, title, "arithmetic intensity (FLOPs a byte, fused)", "FLOP/s (predicted)", height=480)
