"""What if: the seconds and the memory a run would take on other hardware, longer, and under other methods. All predicted."""

from __future__ import annotations

import itertools
import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import streamlit as st

import workbench as wb
from workbench import plots
from workbench.cost.crossover import CrossOver, crossover
from workbench.cost.hardware import ELEMENT_BYTES, HARDWARE, THIS_MACHINE, this_machine_file
from workbench.cost.roofline import Memory
from workbench.cost.under_method import Says
from workbench.errors import UserError
from workbench.experiments.planned import planned
from workbench.models.catalogue import catalogue
from workbench.plots.theme import human_bytes, human_seconds
from workbench.trace.anatomy import Anatomy
from workbench_dashboard import figures
from workbench_dashboard.errors import errors_shown
from workbench_dashboard.links import choice, from_link, number
from workbench_dashboard.plain import as_markdown, visible

OTHER, CONFIG, OWN = "another …", "a config …", "the model's own"
LENGTHS = [2**power for power in range(7, 21)]
"""Contexts that can be chosen, up to 1,048,576 tokens."""
MOST_PARTS = 1024
"""Layers, or experts of a layer, of a config that somebody pasted."""
FIRST_METHODS = ("snapkv", "h2o", "streaming-llm", "quest")


@st.cache_data(max_entries=8, show_spinner="Reading the config")
def anatomy_of(source: str) -> Anatomy:
    return wb.anatomy(source)


@st.cache_data(max_entries=8, show_spinner="Reading the config")
def anatomy_of_config(text: str) -> Anatomy:
    """Raises UserError for what is no config, and for one of more layers or experts than would be counted in a while."""
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        raise UserError("The config is no JSON; paste what stands in a config.json.") from None
    if not isinstance(config, dict):
        raise UserError("The config is no JSON object; paste what stands in a config.json.")
    parts = (value for value in config.values() if isinstance(value, dict))
    for name, value in itertools.chain(config.items(), *(part.items() for part in parts)):
        if any(word in name for word in ("layer", "expert")) and isinstance(value, int) and value > MOST_PARTS:
            raise UserError(
                f"The config says {name[:40]!r} is {value}, and at most {MOST_PARTS:,} are counted here; make it less."
            )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "config.json"
        file.write_text(json.dumps(config))
        return wb.anatomy(file)


@st.cache_data(max_entries=32, show_spinner="Looking where each method pays")
def crossed(
    anatomy: Anatomy, hardware: str, dtype: str | None, batch: int, new_tokens: int, setups: tuple[str, ...]
) -> CrossOver:
    says: Mapping[str, Says] = {setup: planned(setup) for setup in setups}
    sizes: dict[str, Any] = {"dtype": dtype, "batch": batch, "new_tokens": new_tokens}
    return crossover(anatomy, hardware, says, contexts=LENGTHS, **sizes)


def model_input() -> Anatomy:
    """A model of the catalogue, a name, or a config. Raises UserError for what is none."""
    names = [*(entry["name"] for entry in catalogue()), OTHER, CONFIG]
    name = from_link("model", names, names[0])
    chosen = st.selectbox("Model", names, index=names.index(name), key="what_if.model")
    st.query_params["model"] = chosen
    if chosen == CONFIG:
        about = "What stands in a config.json, with its model_type."
        return anatomy_of_config(st.text_area("Config", "{}", key="what_if.config", help=about, max_chars=100_000))
    if chosen == OTHER:
        source = st.text_input("Path or hub id", key="what_if.name", help="Its config alone is read.").strip()
    else:
        source = chosen
    if not source:
        raise UserError("There is no model yet; give its path or its hub id.")
    return anatomy_of(source)


def context_input() -> int:
    start = from_link("context", LENGTHS, 8192)
    value = st.select_slider("Context (tokens)", LENGTHS, start, format_func=lambda each: f"{each:,}", key="what_if.context")
    st.query_params["context"] = str(value)
    return value


def memory_sentence(memory: Memory, label: str) -> str:
    """Whether it fits, in words."""
    needed = f"{human_bytes(memory.weights_bytes)} of weights and {human_bytes(memory.kv_bytes)} of KV cache"
    if memory.fits:
        return f"Fits: {needed} in the {human_bytes(memory.memory_bytes)} of one {label}; activations come on top."
    return f"Does not fit: {needed} need the memory of {memory.devices} times {label}."


def plannable() -> list[str]:
    """Methods whose runs can be planned."""
    names = []
    for name in wb.METHODS:
        try:
            planned(name)
        except UserError:
            continue
        names.append(name)
    return names


asked = None
with st.sidebar, errors_shown():
    anatomy = model_input()
    sheets = [*HARDWARE, *([THIS_MACHINE] if this_machine_file().exists() else [])]
    hardware = choice("Hardware", "hardware", sheets, "h100-sxm")
    dtype = choice("Dtype", "dtype", [OWN, *ELEMENT_BYTES], "bf16")
    sizes = {
        "batch": number("Batch (rows)", "batch", 1),
        "context": context_input(),
        "new_tokens": number("New tokens", "new", 256),
    }
    asked = (anatomy, hardware, None if dtype == OWN else dtype, sizes)
if asked is not None:
    anatomy, hardware, dtype, sizes = asked
    prediction = wb.predict(anatomy, hardware, dtype=dtype, **sizes)
    st.text(visible(memory_sentence(prediction.memory, prediction.hardware.label)))
    st.text(visible(f"Predicted: {human_seconds(prediction.predicted_s)} in all."))
    figures.show(plots.predicted_time(prediction), "what_if.time")
    figures.show(plots.roofline(prediction), "what_if.roofline")
    for note in prediction.notes:
        st.caption(as_markdown(note))
    st.subheader("Where each method starts to pay", anchor=False)
    names = plannable()
    with st.container(horizontal=True, vertical_alignment="bottom"):
        methods = st.multiselect("Methods", names, [name for name in FIRST_METHODS if name in names], key="what_if.methods")
        budget = st.slider("Budget (share of the prompt)", 0.01, 1.0, 0.2, 0.01, key="what_if.budget")
        kinds = {"the whole run": "total_s", "the prefill": "prefill_s", "a decode step": "step_s"}
        kind = st.selectbox("Seconds of", list(kinds), key="what_if.kind")
    with errors_shown():
        if not methods:
            raise UserError("There is no method to compare with dense; choose one.")
        setups = tuple(f"{name}:budget={budget:g}" for name in methods)
        found = crossed(anatomy, hardware, dtype, sizes["batch"], sizes["new_tokens"], setups)
        figures.show(plots.cross_over(found, kinds[kind]), "what_if.cross_over")
        for setup in setups:
            st.text(visible(found.sentence(setup)))
