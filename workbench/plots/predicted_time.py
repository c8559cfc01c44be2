"""Predicted seconds by component: where the time of a run would go."""

from __future__ import annotations

import plotly.graph_objects as go

from workbench.cost.flops import COMPONENTS
from workbench.cost.roofline import Prediction
from workbench.plots.text import plain
from workbench.plots.theme import PALETTE, human_seconds, style


def predicted_time(prediction: Prediction) -> go.Figure:
    """Lying bars, one a phase, a colour a component; each bar is the phase's mean step, so that phases compare."""
    table, phases = prediction.table, prediction.phases.set_index("phase")
    order = {name: place for place, name in enumerate(COMPONENTS)}
    figure = go.Figure()
    names = sorted(table["component"].unique(), key=lambda name: order.get(name, len(order)))
    for name in names:
        rows = table[table["component"] == name].set_index("phase")
        place = order.get(name, len(order))
        seconds = (rows["predicted_s"] / phases["steps"]).reindex(phases.index).fillna(0.0)
        share = seconds / phases["predicted_step_s"]
        figure.add_bar(
            x=share,
            y=[f"{phase}: {human_seconds(phases['predicted_step_s'][phase])} a step" for phase in phases.index],
            orientation="h",
            name=plain(name),
            marker={"color": PALETTE[place % len(PALETTE)], "pattern": {"shape": "/" if place >= len(PALETTE) else ""}},
            customdata=[*zip(map(human_seconds, seconds), rows["bound"].reindex(phases.index).fillna(""), strict=True)],
            hovertemplate=f"{plain(name)}<br>%{{customdata[0]}} a step, %{{x:.1%}} of it<br>bound by %{{customdata[1]}}"
            "<extra></extra>",
        )
    figure.update_layout(barmode="stack")
    figure.update_xaxes(tickformat=".0%", range=[0, 1])
    figure.update_yaxes(autorange="reversed")
    where = f"{plain(prediction.model)} on {plain(prediction.hardware.label)}, {prediction.dtype}"
    title = f"Predicted time by component<br><sub>{where}</sub>"
    return style(figure, title, "share of the step's predicted time", "", height=150 + 70 * len(phases)).update_layout(
        margin={"l": 190}
    )
