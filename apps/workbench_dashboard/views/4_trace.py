"""Trace: a trace directory, or a zip of one, opened and looked at."""

from __future__ import annotations

from functools import partial

import streamlit as st

from workbench.trace.archive import zip_of
from workbench_dashboard.errors import errors_shown
from workbench_dashboard.trace_views import perfetto, summary, trace_inputs, views

trace = None
with st.sidebar, errors_shown():
    trace = trace_inputs("trace")
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
