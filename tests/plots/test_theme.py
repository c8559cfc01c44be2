"""The look of figures is measured: contrast, colours for people who lack a kind of cone, and what `dark` changes."""

from __future__ import annotations

import itertools

import numpy as np
import plotly.graph_objects as go
import pytest

import workbench as wb
from workbench.plots.look import DARK, LIGHT, Look
from workbench.plots.theme import note, style

OTHER_PAGES = {LIGHT: ("#FFFFFF",), DARK: ("#171614", "#0E1117", "#111111")}
"""Pages of Streamlit (1.67, and before) and JupyterLab in their light and dark themes."""
LINES, TEXT = 3.0, 4.5
"""Least contrast of WCAG 2.2, success criteria 1.4.11 and 1.4.3."""
APART = 14.0
"""Least distance of two colours in CIELAB, of which 2.3 can just be told apart side by side."""
VISIONS = {
    "normal": np.eye(3),
    "protanopia": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deuteranopia": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritanopia": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
"""Machado, Oliveira and Fernandes (2009), severity 1, on linear RGB: https://doi.org/10.1109/TVCG.2009.113."""
TO_XYZ = np.array([[0.4124564, 0.3575761, 0.1804375], [0.2126729, 0.7151522, 0.0721750], [0.0193339, 0.1191920, 0.9503041]])


def linear(colour: str) -> np.ndarray:
    """Linear RGB of `#RRGGBB`."""
    encoded = np.array([int(colour[place : place + 2], 16) for place in (1, 3, 5)]) / 255
    return np.where(encoded <= 0.04045, encoded / 12.92, ((encoded + 0.055) / 1.055) ** 2.4)


def contrast(colour: str, other: str) -> float:
    """WCAG's ratio, 1 to 21."""
    low, high = sorted(float(TO_XYZ[1] @ linear(each)) for each in (colour, other))
    return (high + 0.05) / (low + 0.05)


def lab(colour: str, vision: np.ndarray) -> np.ndarray:
    """CIELAB (D65) of a colour as somebody sees it."""
    x, y, z = (
        np.cbrt(share) if share > 0.008856 else 7.787 * share + 16 / 116
        for share in TO_XYZ @ np.clip(np.asarray(vision) @ linear(colour), 0, 1) / (0.95047, 1.0, 1.08883)
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("look", [LIGHT, DARK], ids=["light", "dark"])
def test_lines_and_texts_stand_out_from_the_page(look: Look):
    for page in (look.paper, *OTHER_PAGES[look]):
        for colour in (*look.palette, look.dense, look.mark):
            assert contrast(colour, page) >= LINES, colour
        for colour in (look.ink, look.mark):
            assert contrast(colour, page) >= TEXT, colour
    assert contrast(look.high, look.low) >= LINES
    for under in (look.low, look.high_under_text):
        assert contrast(look.ink, under) >= TEXT


@pytest.mark.parametrize("vision", VISIONS)
@pytest.mark.parametrize("look", [LIGHT, DARK], ids=["light", "dark"])
def test_any_two_colours_stay_apart_for_the_colour_blind(look: Look, vision: str):
    seen = {colour: lab(colour, VISIONS[vision]) for colour in (*look.palette, look.dense)}
    for one, other in itertools.combinations(seen, 2):
        assert np.linalg.norm(seen[one] - seen[other]) >= APART, (one, other)


def test_a_light_colour_has_one_dark_counterpart():
    colours = [*LIGHT.palette, LIGHT.paper, LIGHT.ink, LIGHT.grid, LIGHT.mark, LIGHT.dense, LIGHT.low, LIGHT.high]
    assert len(set(colours)) == len(colours) and len(LIGHT.palette) == len(DARK.palette)


def colours_of(part, inside: bool = False):
    """Every colour that a figure names."""
    if isinstance(part, dict):
        for key, each in part.items():
            yield from colours_of(each, "color" in key)
    elif isinstance(part, list | tuple):
        for each in part:
            yield from colours_of(each, inside)
    elif inside and isinstance(part, str) and part.startswith("#"):
        yield part


def test_a_dark_copy_says_the_same_in_dark_colours(tiny):
    figure = wb.compare(tiny, wb.workloads.recall(context=96, samples=1, facts=1), ["h2o:budget=0.5"]).pareto()
    before = figure.to_json()
    copy = wb.plots.dark(figure)
    assert figure.to_json() == before
    assert copy.layout.template.layout.paper_bgcolor == DARK.paper and copy.layout.template.layout.font.color == DARK.ink
    for light, dark in zip(figure.data, copy.data, strict=True):
        assert list(light.x) == list(dark.x) and list(light.y) == list(dark.y) and light.name == dark.name
    known = {colour for colour in vars(DARK).values() if isinstance(colour, str)} | set(DARK.palette)
    drawn = {key: value for key, value in copy.to_plotly_json()["layout"].items() if key != "template"}
    assert set(colours_of([copy.to_plotly_json()["data"], drawn])) <= known
    assert {line.line.color for line in copy.data} == {DARK.dense, DARK.mark, DARK.palette[LIGHT.palette.index(colour(figure))]}


def colour(figure: go.Figure) -> str:
    return next(trace.line.color for trace in figure.data if trace.name == "h2o")


def test_a_text_that_reads_like_a_colour_stays_a_text():
    figure = style(go.Figure(), LIGHT.paper, LIGHT.ink, "")
    note(figure, LIGHT.mark)
    copy = wb.plots.dark(figure)
    assert copy.layout.title.text == LIGHT.paper and copy.layout.annotations[0].text == LIGHT.mark
