"""How the tokens of each layer spread over its experts."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.errors import UserError
from workbench.plots.text import plain
from workbench.plots.theme import SHARE_SCALE, colour_bar, note, style
from workbench.trace.snapshot import Snapshot
from workbench.trace.trace import Trace


def expert_counts(trace: Trace) -> tuple[np.ndarray, tuple[int, ...]]:
    """`[M, E]` tokens each expert was given over the whole trace, and the M layers that have experts.

    NaN where a layer has fewer experts than the widest one. Raises UserError for a model without experts.
    """
    experts = {layer.index: layer.experts.num_experts for layer in trace.anatomy.layers if layer.experts is not None}
    if not experts:
        raise UserError(f"{trace.anatomy.class_name} has no experts; draw the load of a mixture of experts such as tiny-moe.")
    counts = np.full((len(experts), max(experts.values())), np.nan)
    rows = {layer: number for number, layer in enumerate(experts)}
    for layer, number in experts.items():
        counts[rows[layer], :number] = 0
    routing = trace.table("routing").groupby(["layer", "expert"], as_index=False)["tokens"].sum()
    counts[routing["layer"].map(rows).to_numpy(), routing["expert"].to_numpy()] = routing["tokens"]
    return counts, tuple(experts)


def expert_load(of: Snapshot | Trace) -> go.Figure:
    """Heat map, layers by experts: each expert's share of the tokens its layer handed out.

    A token is handed to several experts at once and counts for each. Raises UserError for a model without experts.
    """
    if isinstance(of, Trace):
        counts, layers = expert_counts(of)
        setup = of.setup
    elif of.experts is None:
        raise UserError(f"{of.model} has no experts; draw the load of a mixture of experts such as tiny-moe.")
    else:
        counts, layers, setup = of.experts, of.expert_layers, of.setup
    total = np.nansum(counts, axis=1, keepdims=True)
    figure = go.Figure()
    if total.any():
        share = counts / np.maximum(total, 1)
        figure.add_heatmap(
            z=share,
            y=list(range(len(layers))),
            customdata=counts,
            colorscale=SHARE_SCALE,
            zmin=0,
            zmax=max(float(np.nanmax(share)), 2 / counts.shape[1]),
            colorbar=colour_bar("share of the layer", tickformat=".2~p"),
            hovertemplate="expert %{x}, layer %{y}<br>%{customdata:,} tokens, %{z:.1%} of the layer's<extra></extra>",
        )
    else:
        note(figure, "No token was routed yet.")
    title = f"Expert load: {plain(setup)}<br><sub>an even load is {1 / counts.shape[1]:.1%} each</sub>"
    style(figure, title, "expert", "layer", height=150 + 34 * min(len(layers), 20))
    figure.update_yaxes(autorange="reversed", tickvals=list(range(len(layers))), ticktext=list(map(str, layers)))
    return figure.update_layout(uirevision="live" if isinstance(of, Snapshot) else None)
