"""What belongs to one browser session: what plays and compares for it, which a closed tab frees."""

from __future__ import annotations

import itertools

import streamlit as st

from workbench.live import Player
from workbench_dashboard.comparer import Comparer

PERIOD_S = 0.4
"""Seconds between two drawings of a run that goes on, and between two snapshots of it."""
UNWATCHED_S = 30.0
"""A run stops when its page has not been drawn for so long."""

_numbers = itertools.count(1)


@st.cache_resource(scope="session", show_spinner=False)
def name() -> str:
    """How others in a model's line see this session."""
    return f"visitor {next(_numbers)}"


@st.cache_resource(scope="session", on_release=Player.close, show_spinner=False)
def player() -> Player:
    """The player of this session's runs."""
    return Player(name(), period_s=PERIOD_S, unwatched_s=UNWATCHED_S)


@st.cache_resource(scope="session", on_release=Comparer.cancel, show_spinner=False)
def comparer() -> Comparer:
    """What runs this session's comparisons."""
    return Comparer(name())
