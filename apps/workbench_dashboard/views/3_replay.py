"""Replay: a dense run is recorded once; what any method would have kept of it, and lost, follows the sliders."""

from __future__ import annotations

from pathlib import Path

import streamlit as st

import workbench as wb
from workbench import plots
from workbench.errors import UserError
from workbench.live import line_of
from workbench.methods.base import Method
from workbench.trace.recording import Recording
from workbench_dashboard import figures, visitor
from workbench_dashboard.errors import errors_shown
from workbench_dashboard.forms import dataclass_inputs
from workbench_dashboard.models import choose_model
from workbench_dashboard.plain import as_markdown, visible
from workbench_dashboard.prompts import prompt_input
from workbench_dashboard.replay_bench import ReplayBench

RECORD, OPEN = "record a prompt", "open a recording"
FILL_S, PERIOD_S = 0.25, 0.4
"""Seconds of work on the curves at a time, and between two times."""


@st.cache_resource(scope="session", max_entries=1, show_spinner="Recording, when it is this model's turn")
def recorded(_lm: wb.LM, model: str, tokens: tuple[int, ...], new_tokens: int, layers: tuple[int, ...]) -> ReplayBench:
    with line_of(_lm.model).turn(visitor.name()):
        return ReplayBench(wb.record(_lm, tokens, new_tokens=new_tokens, layers=list(layers) or "all"))


@st.cache_resource(scope="session", max_entries=1, show_spinner="Opening the recording")
def opened(path: str, changed_ns: int) -> ReplayBench:
    return ReplayBench(Recording.load(path))


def bench_inputs() -> tuple[wb.LM, ReplayBench | None]:
    """The model, and what was recorded of it or opened, if anything was. Raises UserError as the forms do."""
    lm = choose_model()
    if st.selectbox("Recording", [RECORD, OPEN], key="replay.source") == OPEN:
        path = st.text_input("Folder", key="replay.path", help="What Recording.save wrote.").strip()
        if not path:
            return lm, None
        file = Path(path) / "meta.json"
        return lm, opened(path, file.stat().st_mtime_ns if file.exists() else 0)
    tokens = prompt_input(lm, "replay.prompt")
    new_tokens = int(st.number_input("New tokens", value=32, min_value=1, step=8, key="replay.new_tokens"))
    growing = [layer.index for layer in lm.anatomy.layers if layer.attention.window is None]
    layers = st.multiselect("Layers", growing, key="replay.layers", placeholder="all that grow")
    if st.button("Record", type="primary", key="replay.record"):
        st.session_state["replay.asked"] = (lm.name, tuple(tokens), new_tokens, tuple(layers))
    asked = st.session_state.get("replay.asked")
    return lm, recorded(lm, *asked) if asked is not None and asked[0] == lm.name else None


def method_inputs(bench: ReplayBench) -> Method:
    """One of the methods that can be replayed, its knobs and its budget."""
    first = bench.offered.index("snapkv") if "snapkv" in bench.offered else 0
    name = st.selectbox("Method", bench.offered, index=first, key="replay.method")
    share = st.slider("Budget (share of the prompt)", 0.01, 1.0, 0.2, 0.01, key="replay.budget")
    with st.expander("Knobs", key="replay.knobs"):
        return dataclass_inputs(wb.METHODS[name], "replay", leave_out=["budget"]).with_budget(share)


@st.fragment
@errors_shown()
def explorer(bench: ReplayBench) -> None:
    """The chosen method: its sliders, and what it kept and lost. Only this part is drawn anew when a slider moves."""
    recording = bench.recording
    controls, pictures = st.columns([1, 3])
    with controls:
        method = method_inputs(bench)
        step = (
            st.slider("Decoded token", 0, recording.steps - 1, recording.steps - 1, key="replay.step")
            if recording.steps > 1
            else 0
        )
        layer = st.selectbox("Layer", ["all", *(each.layer for each in recording.layers)], key="replay.layer")
    chosen = None if layer == "all" else int(layer)
    one = bench.replay([method])
    (point,) = one.points
    with pictures:
        figures.show(plots.replay_map(one, point.setup, point.budget, step, chosen, bench.texts), "replay.map")
        left, right = st.columns(2)
        with left:
            figures.show(plots.replay_steps(one, point.setup, point.budget, chosen), "replay.mass")
        with right:
            figures.show(plots.replay_steps(one, point.setup, point.budget, chosen, "output_error"), "replay.error")


@errors_shown()
def curves(bench: ReplayBench, was_filling: bool) -> None:
    """All methods on one chart, filled in little by little."""
    y = st.segmented_control("Curves of", ["mass_retained", "output_error"], default="mass_retained", key="replay.y")
    names = st.multiselect("Methods", bench.offered, default=bench.offered, key="replay.methods", label_visibility="collapsed")
    methods, done = bench.curves(names, FILL_S)
    st.session_state["replay.filling"] = not done
    if done == was_filling:  # drawn anew by itself from now on, or no more
        st.rerun()
    if methods:
        shown = bench.replay(methods)
        labels = {point.setup for point in shown.points}
        check = bench.check[1] if bench.check is not None and labels.issuperset(bench.check[0]) else None
        figures.show(plots.replay_curves(shown, check, y or "mass_retained"), "replay.curves")


@errors_shown()
def check_live(lm: wb.LM, bench: ReplayBench) -> None:
    """Runs a few points of the curves for real, when it is this model's turn."""
    methods, _ = bench.curves(st.session_state.get("replay.methods", bench.offered), 0.0)
    if not methods:
        raise UserError("There is nothing to check; choose a method for the curves.")
    bar = st.progress(0.0, "Waiting for the model")
    with line_of(lm.model).turn(visitor.name()):
        found = wb.check_replay(
            lm,
            bench.recording,
            bench.replay(methods),
            on_progress=lambda label, done, of: bar.progress(done / of, as_markdown(label)),
        )
    bar.empty()
    bench.check = (tuple(point.setup for point in found.points), found)


lm, bench = None, None
with st.sidebar, errors_shown():
    lm, bench = bench_inputs()
if lm is None or bench is None:
    st.info("Record a prompt on the left, or open a recording. Then every method, budget and knob is a matter of milliseconds.")
else:
    st.text(visible(repr(bench.recording)))
    explorer(bench)
    if st.button("Check live", key="replay.check", help="Runs up to 6 points of the curves along the recorded tokens."):
        check_live(lm, bench)
    filling = st.session_state.get("replay.filling", True)
    st.fragment(curves, run_every=PERIOD_S if filling else None)(bench, filling)
    if bench.check is not None:
        st.text(str(bench.check[1]))
        st.dataframe(bench.check[1].table, hide_index=True, key="replay.checked")
    if bench.missing:
        with st.expander("Methods that no recording can replay", key="replay.missing"):
            for why in bench.missing.values():
                st.text(visible(why))
