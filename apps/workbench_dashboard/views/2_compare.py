"""Compare: methods at budgets on a workload; results are kept, and opened again by their link."""

from __future__ import annotations

import dataclasses

import streamlit as st

import workbench as wb
from workbench.cli import DEMO_METHODS
from workbench.errors import UserError
from workbench.live import line_of
from workbench.methods import parse_setup
from workbench_dashboard import comparison_view, kept, visitor
from workbench_dashboard.comparer import Comparer, Job
from workbench_dashboard.errors import errors_shown, show_error
from workbench_dashboard.forms import budgets_input, dataclass_inputs
from workbench_dashboard.models import choose_model
from workbench_dashboard.plain import as_markdown

PERIOD_S = 0.5  # between two drawings of the progress


def job_inputs() -> Job:
    """What the forms say. Raises UserError as they do."""
    lm = choose_model()
    workloads = list(wb.workloads.WORKLOADS)
    workload = st.selectbox("Workload", workloads, index=workloads.index("recall"), key="compare.workload")
    st.caption(as_markdown(wb.workloads.WORKLOADS[workload].summary()))
    chosen = dataclass_inputs(wb.workloads.WORKLOADS[workload], "compare")
    names = [name for name in wb.METHODS if name != "dense"]
    methods = st.multiselect("Methods", names, default=list(DEMO_METHODS), key="compare.methods")
    budgets = budgets_input((0.5, 0.2), "compare.budgets")
    own = st.text_area(
        "Setups of your own",
        key="compare.own",
        placeholder="h2o:budget=0.3,recent=0.5",
        help="One a line; methods of several slots with a + between them.",
    )
    setups = [method for name in methods for method in _at_budgets(wb.METHODS[name], budgets)]
    setups += [parse_setup(line) for line in own.splitlines() if line.strip()]
    if not setups:
        raise UserError("There is nothing to compare with dense; choose a method.")
    return Job(lm, chosen, [wb.Setup.of(setup) for setup in setups])


def _at_budgets(cls: type[wb.Method], budgets: list[float | int]) -> list[wb.Method]:
    """The method at each budget, or once by its defaults."""
    has_budget = "budget" in {field.name for field in dataclasses.fields(cls)}
    return [cls(budget=budget) for budget in budgets] if has_budget and budgets else [cls()]


@errors_shown()
def progress(comparer: Comparer, was_busy: bool) -> None:
    job = comparer.job
    if job is None:
        return
    if was_busy and not job.busy:
        st.rerun()
    if job.busy:
        others = set(line_of(job.lm.model).names) - {comparer.name}
        line = f" In line for {job.lm.name}: {', '.join(line_of(job.lm.model).names)}." if others else ""
        now = list(job.done)[-1:] or ["the first setup"]
        st.progress(job.progress, as_markdown(f"{job.status.capitalize()}: {now[0]}, {job.progress:.0%} of all.{line}"))
    elif job.status == "called off":
        st.info("Called off. What was finished is kept: compare again, and it goes on from there.")
    if job.error is not None:
        show_error(job.error)


@st.cache_resource(max_entries=4, show_spinner="Opening the comparison")
def opened(id: str) -> wb.Comparison:
    return kept.opened(id)


comparer = visitor.comparer()
busy = comparer.job is not None and comparer.job.busy
if (new := comparer.take_new()) is not None:
    st.query_params["id"] = new
asked = None
with st.sidebar, errors_shown():
    asked = job_inputs()
with st.container(horizontal=True, vertical_alignment="bottom"):
    if st.button("Compare", type="primary", key="compare.run", disabled=asked is None or busy):
        comparer.start(asked)
        st.query_params.pop("id", None)
        st.rerun()
    if st.button("Cancel", key="compare.cancel", disabled=not busy):
        comparer.cancel()
    earlier = st.selectbox("Earlier comparisons", kept.ids(), index=None, key="compare.earlier", placeholder="open one")
    if st.button("Open", key="compare.open", disabled=earlier is None):
        st.query_params["id"] = earlier
        st.rerun()
st.fragment(progress, run_every=PERIOD_S if busy else None)(comparer, busy)
if id := st.query_params.get("id"):
    comparison_view.draw(opened(id), id)
elif not busy:
    st.info("Choose on the left and press Compare, or open an earlier comparison.")
