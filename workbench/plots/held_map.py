"""What a run that goes on holds now, layer by layer."""

from __future__ import annotations

import plotly.graph_objects as go

from workbench.plots.matrix import token_matrix
from workbench.plots.text import plain
from workbench.plots.theme import HELD_HEATMAP
from workbench.trace.snapshot import Snapshot


def held_map(snapshot: Snapshot) -> go.Figure:
    """Heat map, layers by positions: the share of a layer's kv heads that hold each token now."""
    return token_matrix(
        snapshot.held,
        range(len(snapshot.held)),
        snapshot.texts,
        snapshot.phases,
        title=f"Tokens held now: {plain(snapshot.setup)}",
        value="held by VALUE:.0%} of kv heads",
        heatmap=HELD_HEATMAP,
    ).update_layout(uirevision="live")
