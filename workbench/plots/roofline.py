"""The roofline of a device, with the components of a predicted run as points."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.cost.roofline import Prediction
from workbench.plots.theme import PALETTE, SYMBOLS, style

_MARGIN = 4
"""How far the roof is drawn beyond the outermost point and the ridge, as a factor."""


def roofline(prediction: Prediction) -> go.Figure:
    """Log-log: FLOP/s over FLOPs a byte, a colour a phase, a symbol a component; on the roof unless a machine was measured.

    Components without FLOPs (norms, cache, embedding) have no place on it and are left out.
    """
    hardware, dtype = prediction.hardware, prediction.dtype
    points = prediction.table[prediction.table["flops"] > 0].dropna(subset="intensity")
    ridge, peak = hardware.ridge(dtype), hardware.peak(dtype)
    ends = [min(points["intensity"].min(), ridge) / _MARGIN, max(points["intensity"].max(), ridge) * _MARGIN]
    figure = go.Figure()
    figure.add_scatter(
        x=[ends[0], ridge, ends[1]],
        y=[ends[0] * hardware.bandwidth, peak, peak],
        mode="lines",
        name=f"{hardware.name}, {dtype}: the bound",
        line={"color": "#555555", "width": 2},
        hovertemplate=f"ridge at {ridge:.3g} FLOPs a byte<extra></extra>",
    )
    components = list(dict.fromkeys(points["component"]))
    for number, (phase, rows) in enumerate(points.groupby("phase", sort=False)):
        figure.add_scatter(
            x=rows["intensity"],
            y=rows["flops"] / rows["predicted_s"],
            mode="markers+text",
            name=str(phase),
            text=rows["component"],
            textposition="bottom right",
            textfont={"size": 10},
            marker={
                "size": 11,
                "color": PALETTE[number % len(PALETTE)],
                "symbol": [SYMBOLS[components.index(name) % len(SYMBOLS)] for name in rows["component"]],
            },
            customdata=np.column_stack([rows["component"], rows["bound"], rows["predicted_s"]]),
            hovertemplate=f"{phase}, %{{customdata[0]}}: bound by %{{customdata[1]}}<br>%{{x:.3g}} FLOPs a byte<br>"
            "%{y:.3g} FLOP/s<br>%{customdata[2]:.3g} s predicted<extra></extra>",
        )
    figure.update_xaxes(type="log", exponentformat="power")
    figure.update_yaxes(type="log", exponentformat="power")
    title = f"Roofline, predicted: {prediction.model} on {hardware.label}, {dtype}"
    return style(figure, title, "arithmetic intensity (FLOPs a byte, fused)", "FLOP/s (predicted)", height=460)
