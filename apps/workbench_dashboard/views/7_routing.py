"""Routing: which experts each token of a run, or of a trace, was given, and what it would take to keep some at hand."""

from __future__ import annotations

from collections.abc import Callable

import pandas as pd
import streamlit as st

import workbench as wb
from workbench import plots
from workbench.cost.routing import expert_cache, layer_kinds
from workbench.errors import UserError
from workbench.live import line_of
from workbench.plots.router_confidence import OF
from workbench.plots.theme import human_bytes
from workbench.trace.schema import PHASES
from workbench.trace.trace import Trace
from workbench_dashboard import figures, visitor
from workbench_dashboard.errors import errors_shown
from workbench_dashboard.forms import setup_inputs
from workbench_dashboard.models import choose_model
from workbench_dashboard.plain import visible
from workbench_dashboard.prompts import prompt_input
from workbench_dashboard.trace_views import row_input, trace_inputs

RUN, OPEN = "run a prompt", "open a trace"
FIRST_MODEL = "tiny-moe"
ALL = "all"
WINDOW = 48
"""Tokens whose lanes are drawn at first, each wide enough to be read."""
NARROW = 160
"""Pixels of a drop-down above a figure."""


@st.cache_resource(scope="session", max_entries=1, show_spinner="Running, in its turn", hash_funcs={wb.Setup: repr})
def run(_lm: wb.LM, model: str, setup: wb.Setup, tokens: tuple[int, ...], new_tokens: int) -> Trace:
    with line_of(_lm.model).turn(visitor.name()):
        session = wb.Session(_lm, setup, routing="logits")
        session.prefill(list(tokens))
        session.generate(new_tokens, stop_at_end=False)
        return session.trace


def run_inputs() -> Trace | None:
    """What was run last with the model chosen. Raises UserError as the forms do, and for a model without experts."""
    lm = choose_model(FIRST_MODEL)
    if all(layer.experts is None for layer in lm.anatomy.layers):
        raise UserError(f"{lm.name} has no experts; choose a mixture of experts such as {FIRST_MODEL}.")
    setup = setup_inputs("routing.setup")
    tokens = prompt_input(lm, "routing.prompt")
    new_tokens = int(st.number_input("New tokens", value=32, min_value=1, step=8, key="routing.new_tokens"))
    if st.button("Run", type="primary", key="routing.run"):
        st.session_state["routing.asked"] = (lm.name, setup, tuple(tokens), new_tokens)
    asked = st.session_state.get("routing.asked")
    return run(lm, *asked) if asked is not None and asked[0] == lm.name else None


def numbers(trace: Trace) -> None:
    """The whole trace in five numbers."""
    by_layer = trace.routing()
    phase = "decode" if "decode" in trace.arrow("steps")["phase"].to_pylist() else None
    steps = trace.select(phase=phase).routing() if phase else by_layer
    read, share = (steps["read_bytes"] / steps["steps"]).sum(), steps["read_share"].mean()
    shown = {
        f"Bytes a {phase or 'forward'} step": human_bytes(read),
        "of all experts": f"{share:.0%}",
        "Busiest / mean expert": f"{by_layer['max_over_mean'].mean():.2f}",
        "Reused next token": _share(by_layer["reuse"].mean()),
        "by chance": _share(by_layer["by_chance"].mean()),
    }
    for place, (label, value) in zip(st.columns(len(shown)), shown.items(), strict=True):
        place.metric(label, value)


def _share(value: float) -> str:
    return "n/a" if pd.isna(value) else f"{value:.0%}"


def _load(trace: Trace, phase: str | None) -> None:
    figures.show(plots.expert_load(trace), "routing.load")
    by_layer = trace.routing().drop(columns=["experts", "top_k", "read_share"]).round(3)
    st.dataframe(by_layer, hide_index=True, key="routing.layers")
    st.caption(
        "unique and expected: experts a step, and those of independent, even choices. read_bytes: weights of the experts hit, "
        "modelled from the counts. cv, max_over_mean, entropy, gini: how even. reuse: the share of a token's experts that the "
        "token before it had. information: what a token's class tells about its expert, 0 to 1."
    )


def _lanes(trace: Trace, phase: str | None) -> None:
    row = row_input(trace, "routing")
    of_row = trace.table("choices").query("row == @row")["position"]
    positions = None
    if len(of_row) and of_row.min() < of_row.max():
        first, last = int(of_row.min()), int(of_row.max())
        window = (first, min(last, first + WINDOW - 1))
        first, last = st.slider("Tokens", first, last, window, key=f"routing.tokens.{row}.{phase}")
        positions = range(first, last + 1)
    figures.show(plots.routing_lanes(trace, row, positions), "routing.lanes")


def _pairs(trace: Trace, phase: str | None) -> None:
    layer = st.selectbox("Layer", _layers(trace), key="routing.pairs", width=NARROW)
    figures.show(plots.co_activation(trace, layer), "routing.together")


def _in_flight(trace: Trace, phase: str | None) -> None:
    layer = st.selectbox("Layer", [ALL, *_layers(trace)], key="routing.layer", width=NARROW)
    figures.show(plots.unique_experts(trace, None if layer == ALL else layer), "routing.unique")


def _cache(trace: Trace, phase: str | None) -> None:
    most = int(layer_kinds(trace.anatomy)["experts"].max())
    slots = st.slider("Slots a layer", 1, most, max(1, most // 2), key="routing.slots") if most > 1 else 1
    figures.show(plots.expert_cache_hits(trace, phase=phase), "routing.cache")
    st.dataframe(expert_cache(trace, [slots]), hide_index=True, key="routing.cached")


def _confidence(trace: Trace, phase: str | None) -> None:
    of = st.selectbox(
        "Of each token", list(OF), format_func=lambda each: each.replace("_", " "), key="routing.of", width=NARROW
    )
    figures.show(plots.router_confidence(trace, of), "routing.confidence")


def _layers(trace: Trace) -> list[int]:
    return [layer.index for layer in trace.anatomy.layers if layer.experts is not None]


VIEWS: dict[str, Callable[[Trace, str | None], None]] = {
    "Load": _load,
    "Lanes": _lanes,
    "Chosen together": _pairs,
    "Tokens in flight": _in_flight,
    "Expert cache": _cache,
    "Confidence": _confidence,
}


@st.fragment
@errors_shown()
def views(trace: Trace) -> None:
    """The chosen view of the chosen phase."""
    first = next(iter(VIEWS))
    with st.container(horizontal=True, vertical_alignment="bottom"):
        chosen = st.segmented_control("View", list(VIEWS), default=first, key="routing.view")
        present = set(trace.arrow("steps")["phase"].to_pylist())
        phase = st.selectbox("Phase", [ALL, *(each for each in PHASES if each in present)], key="routing.phase", width=NARROW)
    selected = trace if phase == ALL else trace.select(phase=phase)
    VIEWS[chosen or first](selected, None if phase == ALL else phase)


trace = None
with st.sidebar, errors_shown():
    source = st.selectbox("Trace", [RUN, OPEN], key="routing.source")
    trace = run_inputs() if source == RUN else trace_inputs("routing")
if trace is None:
    st.info("Run a prompt through a mixture of experts on the left, or open a trace of one.")
else:
    st.text(visible(f"{trace!r}, setup {trace.setup}"))
    numbers(trace)
    views(trace)
