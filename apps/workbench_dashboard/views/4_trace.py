"""Trace: a trace directory, or a zip of one, opened and looked at."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import IO

import streamlit as st

from workbench.trace.archive import read_zip, zip_of
from workbench.trace.soundness import checked
from workbench.trace.trace import Trace
from workbench_dashboard.errors import errors_shown
from workbench_dashboard.launch import UPLOAD_MB
from workbench_dashboard.trace_views import perfetto, summary, views


@st.cache_resource(scope="session", max_entries=2, show_spinner="Opening the trace")
def opened(path: str, changed_ns: int) -> Trace:
    return checked(Trace.load(path))


@st.cache_resource(scope="session", max_entries=2, show_spinner="Opening the zip")
def unpacked(file_id: str, _file: IO[bytes]) -> Trace:
    return read_zip(_file)


def trace_inputs() -> Trace | None:
    """The trace that was uploaded or whose folder was given. Raises UserError for what is none."""
    path = st.text_input("Folder", st.query_params.get("path", ""), key="trace.path", help="What `--out` or Trace.save wrote.")
    file = st.file_uploader("Or a zip of one", type="zip", key="trace.zip", help=f"At most {UPLOAD_MB} MB.")
    if file is not None:
        return unpacked(file.file_id, file)
    if not path.strip():
        return None
    meta = Path(path.strip()) / "meta.json"
    try:
        changed_ns = meta.stat().st_mtime_ns
    except (OSError, ValueError):  # such as a name that is too long; opening it says so
        changed_ns = 0
    return opened(path.strip(), changed_ns)


trace = None
with st.sidebar, errors_shown():
    trace = trace_inputs()
if trace is None:
    st.info("Give the folder of a trace on the left, or upload a zip of it.")
else:
    above = st.container()
    views(trace)
    with above:  # last, since what a long trace costs takes longest to work out
        summary(trace)
    with st.container(horizontal=True):
        st.download_button("Perfetto", partial(perfetto, trace), "trace.json", "application/json", key="trace.perfetto")
        st.download_button("Zip", partial(zip_of, trace), "trace.zip", "application/zip", key="trace.zipped")
