"""What there is to see of runs that go on: numbers, text and figures of their snapshots."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import pandas as pd
import plotly.graph_objects as go
import streamlit as st

import workbench as wb
from workbench.plots.theme import human_bytes
from workbench.trace.snapshot import Snapshot
from workbench_dashboard import figures
from workbench_dashboard.plain import visible

COLUMNS = {
    "KV bytes": "kv_physical_bytes",
    "Time a token": "duration_ns",
    "FLOPs a token": "flops",
    "Bytes moved a token": "moved_bytes",
    "Entropy": "entropy",
    "KL to dense": "kl_to_dense",
    "Agreement with dense": "agrees",
}
"""Curves over the forward calls, all runs in one figure each: what they are called and the column."""

MAPS: dict[str, tuple[Callable[[Snapshot], bool], Callable[[Snapshot], go.Figure]]] = {
    "Tokens held": (lambda _: True, lambda seen: wb.plots.held_map(seen)),
    "Attention mass": (lambda seen: seen.mass is not None, lambda seen: wb.plots.attention_map(seen)),
    "Expert load": (lambda seen: seen.experts is not None, lambda seen: wb.plots.expert_load(seen)),
}
"""Figures of one run: whether there is anything to draw, and the figure."""

_NONE = "n/a"
_IN_A_ROW = 5
_HEIGHT = 300
_TEXT_HEIGHT = 190
_DRAWN = "live.drawn"


def choose_figures() -> list[str]:
    """Which figures to draw, in their order. Fewer take less of the time that the run needs itself."""
    names = [*COLUMNS, *MAPS]
    chosen = st.multiselect("Figures", names, default=names, key="live.figures")
    return [name for name in names if name in chosen]


def draw(snapshots: Mapping[str, Snapshot], chosen: list[str], goes_on: bool) -> None:
    """Draws all of it. While runs go on, at most a third of the time is spent on making figures."""
    for name, seen in snapshots.items():
        st.text(visible(f"{name}: {seen.setup}"))
        _numbers(seen)
    columns = st.columns(len(snapshots)) if snapshots else []
    for place, (name, seen) in zip(columns, snapshots.items(), strict=True):
        with place.container(height=_TEXT_HEIGHT, autoscroll=True, key=f"live.text.{name}"):
            st.text(visible(seen.new_text) or "…")
    drawn = st.session_state.get(_DRAWN)
    if drawn is None or (drawn.snapshots is not snapshots and not (goes_on and time.monotonic() < drawn.until_s)):
        drawn = st.session_state[_DRAWN] = _Drawn(snapshots)
    for number, (key, figure) in enumerate(drawn.figures(chosen).items()):
        if number % 2 == 0:
            left, right = st.columns(2)
        with (left, right)[number % 2]:
            figures.show(figure, f"live.{key}", _HEIGHT)


@dataclass
class _Drawn:
    """Figures of some snapshots, each made once, and until when they will do."""

    snapshots: Mapping[str, Snapshot]
    made: dict[str, go.Figure] = field(default_factory=dict)
    until_s: float = 0.0

    def figures(self, chosen: list[str]) -> dict[str, go.Figure]:
        """Those that were chosen, by key."""
        began_s = time.monotonic()
        wanted = _wanted(self.snapshots, chosen)
        for key in wanted.keys() - self.made.keys():
            self.made[key] = wanted[key]()
            self.until_s = time.monotonic() + 2 * (time.monotonic() - began_s)
        return {key: self.made[key] for key in wanted}


def _wanted(snapshots: Mapping[str, Snapshot], chosen: list[str]) -> dict[str, Callable[[], go.Figure]]:
    """How to make each figure that was chosen and has something to show, by its key."""
    wanted: dict[str, Callable[[], go.Figure]] = {}
    for title in chosen if snapshots else []:
        if title in COLUMNS:
            column = COLUMNS[title]
            if any(seen.history[column].notna().any() for seen in snapshots.values()):
                wanted[column] = partial(wb.plots.live_curve, snapshots, column)
            continue
        there, make = MAPS[title]
        wanted |= {f"{title}.{name}": partial(make, seen) for name, seen in snapshots.items() if there(seen)}
    return wanted


def _numbers(seen: Snapshot) -> None:
    """The newest step in big numbers, in two rows."""
    history = seen.history
    decoded = history[history["phase"] == "decode"]
    last = history.iloc[-1]
    token = decoded.iloc[-1] if len(decoded) else None
    agrees = decoded["agrees"].mean() if decoded["agrees"].notna().any() else None
    shown = {
        "KV held": human_bytes(last["kv_physical_bytes"]),
        "KV by budget": human_bytes(last["kv_nominal_bytes"]),
        "Time a token": _of(token, "duration_ns", lambda value: f"{value / 1e6:.3g} ms"),
        "Tokens": str(len(decoded)),
        "FLOPs a token": _of(token, "flops", lambda value: f"{value:.3g}"),
        "Bytes a token": _of(token, "moved_bytes", human_bytes),
        "Entropy (nats)": _of(token, "entropy", lambda value: f"{value:.2f}"),
        "KL (nats)": _of(token, "kl_to_dense", lambda value: f"{value:.2g}"),
        "Agreement": _NONE if agrees is None else f"{agrees:.0%}",
    }
    for start in (0, _IN_A_ROW):
        for place, label in zip(st.columns(_IN_A_ROW), list(shown)[start : start + _IN_A_ROW], strict=False):
            place.metric(label, shown[label])


def _of(row: pd.Series | None, column: str, write: Callable[[float], str]) -> str:
    """A value of a row in words."""
    return _NONE if row is None or pd.isna(row[column]) else write(float(row[column]))
