"""Live: a run, token by token."""

from __future__ import annotations

import streamlit as st

from workbench_dashboard.forms import setup_inputs
from workbench_dashboard.models import choose_model
from workbench_dashboard.prompts import prompt_input

with st.sidebar:
    lm = choose_model()
    tokens = prompt_input(lm, "live.prompt")
    setup = setup_inputs("live", st.query_params.get("method", ""))
