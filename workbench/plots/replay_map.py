"""What a replayed method would have read, token by token: by layer, or by the kv heads of one layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import plotly.graph_objects as go

from workbench.plots.matrix import token_matrix
from workbench.plots.text import plain
from workbench.plots.theme import HELD_HEATMAP
from workbench.trace.replay import Replay


def replay_map(
    replay: Replay, method: str, budget: float, step: int, layer: int | None = None, texts: Sequence[str | None] | None = None
) -> go.Figure:
    """Heat map of the tokens that were read when decoded token `step` attended: held, unless the method selects.

    Args:
        replay: what was replayed.
        method: as in `Replay.point`.
        budget: one that was replayed.
        step: the decoded token, from 0.
        layer: rows are its kv heads; None: rows are the recorded layers, with the share of the kv heads that read a token.
        texts: the text of each token, by position.

    Raises:
        UserError: for a method, budget, layer or step that was not replayed.
    """
    layers = replay.about["layers"] if layer is None else [layer]
    length = replay.about["prompt_tokens"] + step + 1
    heads = [_masks(replay.read(method, budget, each, step), length) for each in layers]
    values = np.stack([each.mean(0) for each in heads]) if layer is None else heads[0]
    rows = layers if layer is None else range(len(values))
    where = "" if layer is None else f", layer {layer}"
    prompt = replay.about["prompt_tokens"]
    figure = token_matrix(
        values,
        rows,
        [None] * length if texts is None else texts[:length],
        ["prefill"] * prompt + ["decode"] * (length - prompt),
        title=f"Tokens read at step {step}{where}: {plain(replay.point(method, budget).setup)}",
        value="read by VALUE:.0%} of kv heads",
        heatmap=HELD_HEATMAP,
    )
    return figure if layer is None else figure.update_yaxes(title="kv head")


def _masks(positions: Sequence[np.ndarray], length: int) -> np.ndarray:
    """`[H, length]` one where a kv head read a token."""
    masks = np.zeros((len(positions), length))
    for head, found in enumerate(positions):
        masks[head, found] = 1
    return masks
