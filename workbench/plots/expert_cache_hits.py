"""How often a server with room for some of a layer's experts would have had the one it needs at hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.cost.routing import expert_cache, layer_kinds
from workbench.errors import UserError
from workbench.plots.text import plain
from workbench.plots.theme import MARK, PALETTE, human_bytes, style
from workbench.trace.trace import Trace

_POINTS = 16
"""Numbers of slots that are tried unless they are given."""
_LINES = {
    "lru": ("least recently used leaves", {"color": PALETTE[0]}, "circle"),
    "lfu": ("least often used leaves", {"color": PALETTE[1]}, "square"),
    "belady": ("best possible", {"color": MARK, "dash": "dash"}, "diamond"),
}


def expert_cache_hits(trace: Trace, slots: Sequence[int] | None = None, phase: str | None = None) -> go.Figure:
    """Lines of the hit rate over the slots a layer has for experts, a line a policy, replayed over the trace.

    Args:
        trace: of a model with experts.
        slots: experts a layer that fit; None is some numbers up to all of them.
        phase: only the steps of this one; None is all.

    Raises:
        UserError: for fewer than one slot, a phase there is not, and if no expert was called.
    """
    most = int(layer_kinds(trace.anatomy)["experts"].max())
    if slots is None:
        slots = [int(each) for each in np.unique(np.linspace(1, max(1, most), _POINTS).round())]
    if not len(slots):
        raise UserError("There is no number of slots to draw; give some, such as 1, 2 and 4.")
    found = expert_cache(trace, slots, phase=phase)
    figure = go.Figure()
    for policy, of_policy in found.groupby("policy", sort=False):
        name, line, symbol = _LINES[str(policy)]
        loaded = [human_bytes(each) for each in of_policy["loaded_bytes"]]
        figure.add_scatter(
            x=of_policy["slots"],
            y=of_policy["hit_rate"],
            mode="lines+markers",
            name=name,
            line=line,
            marker={"symbol": symbol, "size": 8},
            customdata=[
                [hits, asked, each] for hits, asked, each in zip(of_policy["hits"], of_policy["requests"], loaded, strict=True)
            ],
            hovertemplate=f"{name}<br>%{{x}} slots a layer: %{{y:.1%}} hits<br>%{{customdata[0]:,}} of %{{customdata[1]:,}} "
            "experts found, %{customdata[2]} loaded<extra></extra>",
        )
    steps = f"{phase} steps" if phase is not None else "all steps"
    title = (
        f"Experts found in a cache: {plain(trace.setup)}<br><sub>replayed over {steps}, a layer has up to {most} experts</sub>"
    )
    style(figure, title, "experts that fit (slots a layer)", "hit rate", height=400)
    figure.update_xaxes(tickformat=",d")
    return figure.update_yaxes(tickformat=".0%", range=[0, 1.02])
