"""Which model a page works with: chosen or typed, refused before it is loaded if it does not fit, held for all users."""

from __future__ import annotations

import streamlit as st
import torch

import workbench as wb
from workbench.errors import UserError
from workbench.models.anatomy import Anatomy
from workbench.models.catalogue import catalogue
from workbench.plots.theme import human_bytes
from workbench.probes.memory import free_bytes

MOST_MODELS = 2
"""Models held at once, for all users together; the oldest makes room for another."""

_CHOSEN, _OTHER = "chosen_model", "another …"


def choose_model(first: str | None = None) -> wb.LM:
    """The model's input, and the model. Raises UserError for one that does not exist or does not fit.

    A page opens on the model chosen last on any page; one that gives its own `first` opens on that, and remembers for itself.
    """
    ready = [entry["name"] for entry in catalogue() if entry["ready"]]
    remembered = _CHOSEN if first is None else f"{_CHOSEN}.{first}"
    before = st.session_state.get(remembered, first or ready[0])
    name = st.selectbox("Model", [*ready, _OTHER], index=ready.index(before) if before in ready else len(ready), key="model")
    if name == _OTHER:
        typed = "" if before in ready else before
        name = st.text_input("Path or hub id", typed, key="model.typed", help="A directory with config.json and weights, too.")
        if not name.strip():
            raise UserError("There is no model yet; type the path of a saved one or a hub id.")
    lm = _load(name.strip())
    st.session_state[remembered] = lm.name
    st.caption(f"{human_bytes(weights_bytes(lm.anatomy))} of weights on {lm.device}. {MOST_MODELS} models are held at most.")
    return lm


def weights_bytes(anatomy: Anatomy) -> int:
    """What the weights take in memory."""
    return anatomy.num_parameters * anatomy.element_bytes


def check_fits(name: str) -> None:
    """Reads the config alone. Raises UserError if the weights are larger than the memory that is free."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    free, needed = free_bytes(device), weights_bytes(wb.anatomy(name))
    if free is not None and needed > free:
        raise UserError(
            f"{name} needs {human_bytes(needed)} for its weights, and {human_bytes(free)} are free on {device}; "
            "choose a smaller model."
        )


@st.cache_resource(max_entries=MOST_MODELS, show_spinner="Loading the model")
def _load(name: str) -> wb.LM:
    check_fits(name)
    return wb.load(name)
