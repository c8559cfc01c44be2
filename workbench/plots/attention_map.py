"""Where a run that goes on looks now, layer by layer."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from workbench.plots.matrix import token_matrix
from workbench.plots.text import plain
from workbench.plots.theme import MASS_HEATMAP, MASS_MARK
from workbench.trace.snapshot import Snapshot


def attention_map(snapshot: Snapshot) -> go.Figure:
    """Heat map, layers by positions: attention of the newest observed tokens, mean over query heads and tokens.

    Before anything was observed it is empty and says how to record it.
    """
    layers = len(snapshot.held)
    mass = np.zeros((layers, 0)) if snapshot.mass is None else snapshot.mass
    length = mass.shape[1]
    return token_matrix(
        mass,
        range(layers),
        snapshot.texts[:length],
        snapshot.phases[:length],
        title=f"Attention of the newest tokens: {plain(snapshot.setup)}",
        value="mass VALUE:.4f}",
        heatmap=MASS_HEATMAP,
        mark=MASS_MARK,
        logarithm=True,
        missing="No attention was observed yet; importance='decode' records it from the first decoded token on.",
    ).update_layout(uirevision="live")
