"""A figure is changed in place, the library is sent once, and no more of a figure than a screen can show."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("anywidget", reason="needs the extra `notebook`")
import plotly.graph_objects as go

import workbench as wb
from workbench.trace.snapshot import HISTORY, Snapshot
from workbench.widgets import picture
from workbench.widgets.picture import Picture


@pytest.fixture(autouse=True)
def no_library_yet():
    picture._loaded.clear()
    yield
    picture._loaded.clear()


def heat_map(columns: int, seed: int) -> go.Figure:
    values = np.random.default_rng(seed).random((4, columns))
    return go.Figure(go.Heatmap(z=values, text=[[f"token {n}" for n in range(columns)]] * 4))


def test_the_library_comes_once(sent):
    first, second = Picture(), Picture()
    assert first.library is second.library
    assert sum(size > 2**20 for size in sent) == 1
    first.library.close()
    assert Picture().library.comm is not None, "closed with all others, it comes again"


def test_what_did_not_change_is_not_sent_again(sent):
    shown = Picture(heat_map(500, 0))
    sent.clear()
    shown.draw(heat_map(500, 1))
    assert len(sent) == 1 and sent[0] < 4 * 500 * 4 + 1500, "float32 values; not the texts, not the layout"
    sent.clear()
    shown.draw(heat_map(500, 1))
    assert not sent


def test_rows_that_are_alike_are_sent_once(sent):
    alike, apart = (heat_map(500, 0) for _ in range(2))
    apart.data[0].text = [[f"token {n} of {row}" for n in range(500)] for row in range(4)]
    sizes = []
    for figure in (alike, apart):
        shown = Picture()
        sent.clear()
        shown.draw(figure)
        sizes.append(sum(sent))
    assert sizes[1] > 2 * sizes[0]


def test_a_map_wider_than_the_screen_is_reduced_before_it_is_sent(sent):
    tokens, layers = 100_000, 8
    import pandas as pd

    history = pd.DataFrame({name: [] for name in HISTORY})
    held = np.random.default_rng(0).random((layers, tokens)).round()
    seen = Snapshot("run", "model", "dense", history, ("word",) * tokens, ("prefill",) * tokens, held)
    shown = Picture()
    sent.clear()
    shown.draw(wb.plots.held_map(seen))
    from workbench.plots.matrix import MAX_COLUMNS

    assert shown.figure.data[0].z.shape[1] <= MAX_COLUMNS
    assert sum(sent) < layers * MAX_COLUMNS * 4 + 100_000 < held.nbytes / 20


def test_numbers_arrive_as_they_were():
    values = np.array([[0.125, 1.0], [2.0, np.nan]])
    shown = Picture(go.Figure([go.Heatmap(z=values), go.Scatter(x=np.array([1, 2]), y=np.array([0.1, 0.2]))]))
    matrix, line = shown.traces[0]["z"], shown.traces[1]["y"]
    decoded = np.frombuffer(matrix["bdata"], matrix["dtype"]).reshape(2, 2)
    assert np.array_equal(decoded, values, equal_nan=True)
    assert np.frombuffer(line["bdata"], line["dtype"]).tolist() == [0.1, 0.2], "lines keep their precision"
