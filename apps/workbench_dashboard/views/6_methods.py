"""Methods: the catalogue, from the registry; each can be tried."""

from __future__ import annotations

import inspect

import pandas as pd
import streamlit as st

import workbench as wb
from workbench.methods import describe
from workbench_dashboard.plain import as_markdown

st.text("What there is to try, each from one paper. A method that needs a calibration runs on a model it was calibrated for.")
for name, cls in wb.METHODS.items():
    about = describe(cls)
    with st.expander(as_markdown(f"{name}: {about['summary']}"), key=f"methods.{name}"):
        st.text(f"Slot: {about['slot']}. Source: {about['paper']}.")
        if about["calibrated_by"] is not None:
            depends = f" Its calibration depends on {', '.join(about['calibrated_by'])}." if about["calibrated_by"] else ""
            st.text(f"Needs a calibration: workbench calibrate --model MODEL --method {name}.{depends}")
        if about["knobs"]:
            knobs = pd.DataFrame(about["knobs"], dtype=object).map(
                lambda value: "" if value is None or value != value else str(value)
            )
            st.dataframe(knobs, hide_index=True, key=f"methods.{name}.knobs")
        for verb, member in vars(cls).items():
            if inspect.isfunction(member) and member.__doc__:
                st.text(f"{verb}: {inspect.cleandoc(member.__doc__)}")
        for deviation in about["deviations"]:
            st.text(f"Differs from the paper: {deviation}")
        st.page_link("views/1_live.py", label=f"Try {name} live", query_params={"method": name})
