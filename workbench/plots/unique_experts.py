"""How many experts the tokens in flight hit, beside what independent choices would."""

from __future__ import annotations

import numpy as np
import pandas as pd
import plotly.graph_objects as go

from workbench.cost.choices import experts_a_token, neighbours
from workbench.cost.routing import expected_unique, layer_kinds
from workbench.cost.routing import unique_experts as of_steps
from workbench.errors import UserError
from workbench.plots.text import plain
from workbench.plots.theme import MARK, PALETTE, style
from workbench.trace.trace import Trace

_POINTS = 64
"""Points of the expectation."""
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "star", "hexagon")


def unique_experts(trace: Trace, layer: int | None = None) -> go.Figure:
    """Experts hit over tokens in flight: each kind of step as it ran, the expectation, and neighbours in the text.

    The last, from the table `choices` if there is one, are how many experts so many tokens next to each other hit: what a step
    that verified them together would have read.

    Args:
        trace: of a model with experts.
        layer: None is the mean over all layers that have experts.

    Raises:
        UserError: if no expert was called, in this layer.
    """
    steps = of_steps(trace)
    layers = sorted(map(int, steps["layer"].unique()))
    if layer is not None and layer not in layers:
        raise UserError(f"No expert of layer {layer} was called; there are layers {', '.join(map(str, layers))}.")
    shown = layers if layer is None else [layer]
    steps = steps[steps["layer"].isin(shown)]
    counts, given = layer_kinds(trace.anatomy).set_index("layer")["experts"][shown], experts_a_token(trace).reindex(shown)
    beside = _of_layers(neighbours(trace), shown) if trace.arrow("choices").num_rows else pd.DataFrame()
    longest = max(2, int(steps["tokens"].max()), *(beside["tokens"] if len(beside) else ()))
    tokens = np.unique(np.geomspace(1, longest, _POINTS).round())
    independent = np.mean([expected_unique(tokens, counts[each], given[each]) for each in shown], axis=0)
    figure = go.Figure()
    figure.add_scatter(
        x=tokens,
        y=independent,
        mode="lines",
        name="independent, even choices",
        line={"color": MARK, "dash": "dash"},
        hovertemplate="%{x:,} tokens: %{y:.2f} experts expected<extra></extra>",
    )
    if len(beside):
        figure.add_scatter(
            x=beside["tokens"],
            y=beside["unique"],
            mode="lines+markers",
            name="tokens next to each other",
            line={"color": PALETTE[0]},
            hovertemplate="%{x:,} tokens next to each other: %{y:.2f} experts<extra></extra>",
        )
    ran = steps.groupby(["phase", "tokens"], as_index=False).agg(unique=("unique", "mean"), steps=("step", "nunique"))
    for number, (phase, of_phase) in enumerate(ran.groupby("phase", sort=False)):
        figure.add_scatter(
            x=of_phase["tokens"],
            y=of_phase["unique"],
            mode="markers",
            name=f"{phase}, as it ran",
            marker={"color": PALETTE[1], "symbol": _SYMBOLS[number % len(_SYMBOLS)], "size": 11},
            customdata=of_phase["steps"],
            hovertemplate=f"{phase}, %{{customdata:,}} steps of %{{x:,}} tokens: %{{y:.2f}} experts<extra></extra>",
        )
    where = f"layer {layer}" if layer is not None else "mean over layers"
    about = f"{where}: {counts.mean():.3g} experts, {given.mean():.3g} a token"
    title = f"Experts hit by tokens in flight: {plain(trace.setup)}<br><sub>{about}</sub>"
    style(figure, title, "tokens in flight", "experts hit", height=400)
    doubled = [2**power for power in range(0, longest.bit_length(), 1 + longest.bit_length() // 12)]
    figure.update_xaxes(type="log", tickvals=doubled, ticktext=[f"{each:,}" for each in doubled])
    return figure.update_yaxes(rangemode="tozero")


def _of_layers(table: pd.DataFrame, layers: list[int]) -> pd.DataFrame:
    return table[table["layer"].isin(layers)].groupby("tokens", as_index=False)["unique"].mean()
