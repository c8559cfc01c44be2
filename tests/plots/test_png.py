"""Pictures need kaleido, which nothing else does."""

from __future__ import annotations

import importlib.util

import plotly.graph_objects as go
import pytest

import workbench as wb

HAS_KALEIDO = importlib.util.find_spec("kaleido") is not None


@pytest.mark.skipif(HAS_KALEIDO, reason="kaleido is installed")
def test_without_kaleido_a_sentence_says_what_to_install(tmp_path):
    with pytest.raises(wb.UserError, match=r"needs the package kaleido, which is missing; run 'pip install kaleido'") as caught:
        wb.plots.png(go.Figure(), tmp_path / "figure.png")
    assert str(caught.value).count(".") == 1 and not list(tmp_path.iterdir())


@pytest.mark.skipif(not HAS_KALEIDO, reason="kaleido is not installed")
def test_with_kaleido_it_is_a_picture_of_that_width_or_a_sentence(tmp_path):
    try:
        path = wb.plots.png(go.Figure(), tmp_path / "figure.png", width=300, scale=1)
    except wb.UserError as error:
        assert "plotly_get_chrome" in str(error)
    else:
        assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and int.from_bytes(path.read_bytes()[16:20], "big") == 300
