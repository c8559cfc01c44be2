"""Opening a trace, for every page that looks at one; and what the trace page shows of it, one function a view."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pandas as pd
import streamlit as st

from workbench import plots
from workbench.trace.archive import read_zip
from workbench.trace.query import limited
from workbench.trace.schema import TABLES
from workbench.trace.soundness import checked
from workbench.trace.trace import Trace
from workbench_dashboard import figures
from workbench_dashboard.errors import errors_shown
from workbench_dashboard.launch import UPLOAD_MB
from workbench_dashboard.plain import visible

PREVIEW_ROWS = 200
MAX_ROWS = 1000
_EXAMPLE = "select phase, count(*) as steps, median(duration_ns) / 1e6 as median_ms from steps group by phase"


@st.cache_resource(scope="session", max_entries=2, show_spinner="Opening the trace")
def _opened(path: str, changed_ns: int) -> Trace:
    return checked(Trace.load(path))


@st.cache_resource(scope="session", max_entries=2, show_spinner="Opening the zip")
def _unpacked(file_id: str, _file: IO[bytes]) -> Trace:
    return read_zip(_file)


def trace_inputs(key: str) -> Trace | None:
    """The trace that was uploaded or whose folder was given. Raises UserError for what is none."""
    path = st.text_input("Folder", st.query_params.get("path", ""), key=f"{key}.path", help="What `--out` or Trace.save wrote.")
    file = st.file_uploader("Or a zip of one", type="zip", key=f"{key}.zip", help=f"At most {UPLOAD_MB} MB.")
    if file is not None:
        return _unpacked(file.file_id, file)
    if not path.strip():
        return None
    meta = Path(path.strip()) / "meta.json"
    try:
        changed_ns = meta.stat().st_mtime_ns
    except (OSError, ValueError):  # such as a name that is too long; opening it says so
        changed_ns = 0
    return _opened(path.strip(), changed_ns)


def summary(trace: Trace) -> None:
    """What each phase took, and what was not measured."""
    st.text(visible(f"{trace!r}, setup {trace.setup}"))
    for note in trace.notes:
        st.text(visible(note))
    st.dataframe(trace.summary(), hide_index=True, key="trace.summary")
    st.caption("Seconds, KV bytes and joules are measured; FLOPs and bytes moved (fused) are modelled.")


def _components(trace: Trace) -> None:
    left, right = st.columns(2)
    with left:
        figures.show(plots.components(trace), "trace.flops")
    with right:
        figures.show(plots.components(trace, "bytes"), "trace.bytes")


def _kv_bytes(trace: Trace) -> None:
    figures.show(plots.kv_bytes(trace), "trace.kv")


def _held(trace: Trace) -> None:
    figures.show(plots.cache_map(trace, row_input(trace, "trace")), "trace.map")


def _importance(trace: Trace) -> None:
    row = row_input(trace, "trace")
    recorded = trace.arrow("importance")["step"].unique().to_pylist()
    step = st.select_slider("Forward call", sorted(recorded), key="trace.step") if len(recorded) > 1 else None
    figures.show(plots.importance_map(trace, step, row), "trace.importance")


def _spans(trace: Trace) -> None:
    spans = trace.table("spans")
    if spans.empty:
        st.info("This trace holds no spans; record it with `spans` switched on.")
        return
    of_name = spans.groupby("name")["duration_ns"]
    ms = pd.DataFrame({"calls": of_name.size(), "total_ms": of_name.sum() / 1e6, "median_ms": of_name.median() / 1e6})
    st.dataframe(ms.sort_values("total_ms", ascending=False).reset_index(), hide_index=True, key="trace.spans")


def _tables(trace: Trace) -> None:
    counts = {name: trace.arrow(name).num_rows for name in TABLES}
    name = st.selectbox("Table", list(counts), format_func=lambda each: f"{each} ({counts[each]:,} rows)", key="trace.table")
    first = int(st.number_input("From row", 0, max(0, counts[name] - 1), 0, PREVIEW_ROWS, key="trace.from"))
    st.dataframe(trace.arrow(name).slice(first, PREVIEW_ROWS).to_pandas().map(_shown), hide_index=True, key="trace.rows")


def _sql(trace: Trace) -> None:
    with st.form("trace.asking", border=False):
        text = st.text_area("One SELECT over the tables", _EXAMPLE, key="trace.sql", height=110)
        asked = st.form_submit_button("Run", key="trace.ask")
    if asked:
        answer = limited({name: trace.arrow(name) for name in TABLES}, text, max_rows=MAX_ROWS)
        st.dataframe(answer.rows.map(_shown), hide_index=True, key="trace.answer")
        if answer.cut:
            st.caption(f"These are the first {MAX_ROWS:,} rows.")


VIEWS: dict[str, Callable[[Trace], None]] = {
    "KV bytes": _kv_bytes,
    "By component": _components,
    "Held tokens": _held,
    "Importance": _importance,
    "Spans": _spans,
    "Tables": _tables,
    "SQL": _sql,
}


@st.fragment
@errors_shown()
def views(trace: Trace) -> None:
    """The chosen view."""
    first = next(iter(VIEWS))
    chosen = st.segmented_control("View", list(VIEWS), default=first, key="trace.view", label_visibility="collapsed")
    VIEWS[chosen or first](trace)


def perfetto(trace: Trace) -> bytes:
    """The trace for ui.perfetto.dev."""
    with tempfile.TemporaryDirectory() as folder:
        return trace.to_perfetto(Path(folder) / "trace.json").read_bytes()


def row_input(trace: Trace, key: str) -> int:
    """Which row of the batch, if there are several."""
    rows = trace.arrow("tokens")["row"].unique().to_pylist()
    return st.selectbox("Row of the batch", sorted(rows), key=f"{key}.row") if len(rows) > 1 else 0


def _shown(value: object) -> object:
    """A text with its control characters visible, anything else as it is."""
    return visible(value) if isinstance(value, str) else value
