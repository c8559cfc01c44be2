"""The dashboard: choose a model, methods and budgets, compare them, and look at what each kept.

Run it with `make dashboard`. Every choice comes from the registry, so a new method appears here by itself.
"""

from __future__ import annotations

import streamlit as st

import workbench as wb
from workbench.cli import DEMO_METHODS
from workbench.models.catalogue import catalogue
from workbench.report import table_html

st.set_page_config(page_title="Workbench", layout="wide")


@st.cache_resource(max_entries=2, show_spinner="Loading the model")
def load(name: str) -> wb.LM:
    return wb.load(name)


def choose() -> tuple[str, wb.workloads.Workload, list[str]] | None:
    """The sidebar's form; None until it is sent."""
    with st.sidebar.form("choice"):
        model = st.selectbox("Model", [entry["name"] for entry in catalogue() if entry["ready"]])
        workload = st.selectbox("Workload", list(wb.workloads.WORKLOADS), index=list(wb.workloads.WORKLOADS).index("recall"))
        context = st.slider("Context (tokens)", 128, 1024, 384, 64)
        samples = st.slider("Samples", 1, 16, 4)
        names = [name for name, cls in wb.METHODS.items() if cls.slot == "cache" and name != "dense"]
        methods = st.multiselect("Methods", names, default=list(DEMO_METHODS))
        budgets = st.multiselect("Budgets (share of the prompt)", [0.9, 0.75, 0.5, 0.35, 0.2, 0.1], default=[0.5, 0.2])
        if not st.form_submit_button("Compare", type="primary"):
            return None
    chosen = wb.workloads.WORKLOADS[workload](context=context, samples=samples)
    return model, chosen, [f"{name}:budget={budget}" for budget in budgets for name in methods]


def run(model: str, workload: wb.workloads.Workload, methods: list[str]) -> wb.Comparison:
    bar = st.progress(0.0, "Running")
    steps = (len(methods) + 1) * workload.samples
    done = 0

    def advance(label: str, _: int, __: int) -> None:
        nonlocal done
        done += 1
        bar.progress(min(1.0, done / steps), label)

    comparison = wb.compare(load(model), workload, methods, on_progress=advance)
    bar.empty()
    return comparison


def show(comparison: wb.Comparison) -> None:
    st.html(table_html(comparison))
    left, right = st.columns(2)
    left.plotly_chart(comparison.pareto(), key="score")
    right.plotly_chart(comparison.pareto(y="kl_to_dense"), key="kl")
    st.plotly_chart(wb.plots.kv_bytes(comparison.traces), key="kv")
    label = st.selectbox("What was kept by", [name for name in comparison.traces if name != "dense"] or ["dense"])
    st.plotly_chart(wb.plots.cache_map(comparison.traces[label]), key="map")


st.title("Quality beside cost")
choice = choose()
if choice is not None:
    try:
        st.session_state["comparison"] = run(*choice)
    except wb.UserError as error:
        st.error(str(error))
if "comparison" in st.session_state:
    show(st.session_state["comparison"])
elif choice is None:
    st.info("Choose on the left and press Compare.")
