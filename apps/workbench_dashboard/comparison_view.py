"""A finished comparison on a page: trade-offs, the table with its proof of firing, scores by question and by depth."""

from __future__ import annotations

import streamlit as st

import workbench as wb
from workbench.report import report_html, table_html
from workbench_dashboard import figures
from workbench_dashboard.plain import visible

_HEIGHT = 420


def draw(comparison: wb.Comparison, id: str) -> None:
    about = comparison.about
    st.subheader("Quality beside cost", anchor=False)
    st.text(visible(f"{about['workload']} on {about['model']}: {comparison.settings}."))
    st.html(table_html(comparison))
    st.text("Fired: layers and steps acted on, of those due. KL to dense: nats a token. Times are medians.")
    left, right = st.columns(2)
    with left:
        figures.show(comparison.pareto(), "compare.score", _HEIGHT)
    with right:
        figures.show(comparison.pareto(y="kl_to_dense"), "compare.kl", _HEIGHT)
    if any("budget=" in row.setup for row in comparison.rows):
        figures.show(wb.plots.score_map(comparison), "compare.map")
    if comparison.turns.shape[1] > 1:
        st.subheader("Question by question", anchor=False)
        st.text("Mean score of the 1st, 2nd, … question. The context was compressed once, before the first.")
        st.dataframe(comparison.turns, key="compare.turns")
    if comparison.depths.shape[1] > 1:
        st.subheader("By depth", anchor=False)
        st.text("Mean score by where the answer stands, in percent of the context.")
        st.dataframe(comparison.depths, key="compare.depths")
    st.subheader("What each method kept", anchor=False)
    label = st.selectbox(
        "What was kept by", [name for name in comparison.traces if name != "dense"] or ["dense"], key="compare.kept"
    )
    left, right = st.columns(2)
    with left:
        figures.show(wb.plots.kv_bytes(comparison.traces), "compare.bytes", _HEIGHT)
    with right:
        figures.show(wb.plots.cache_map(comparison.traces[label]), "compare.cache", _HEIGHT)
    st.download_button(
        "Download the report",
        lambda: report_html(comparison),
        f"{id}.html",
        "text/html",
        key="compare.report",
        on_click="ignore",
    )
