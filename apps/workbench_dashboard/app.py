"""The entry: run by `workbench dashboard`. A page is a script `views/NUMBER_name.py`, found by its name and nothing else.

The folder is not called `pages`: Streamlit would take that for its older kind of multipage app, and a first visit to a
page by its address would run that page alone, without this file.
"""

from __future__ import annotations

from pathlib import Path

import streamlit as st

from workbench_dashboard.errors import errors_shown

VIEWS = Path(__file__).parent / "views"

# Room for figures; and what is about to be drawn anew does not fade first, since it is several times a second.
STYLE = """
.stMainBlockContainer { padding-top: 2.5rem }
[data-testid="stMetricValue"] { font-size: 1.35rem }
[data-stale="true"] { opacity: 1 !important }
"""


def title(view: Path) -> str:
    """`What if` of `5_what_if.py`."""
    return view.stem.partition("_")[2].replace("_", " ").capitalize()


st.set_page_config(page_title="Workbench", layout="wide")
views = sorted(VIEWS.glob("[0-9]*_*.py"), key=lambda view: int(view.stem.partition("_")[0]))
chosen = st.navigation([st.Page(view, title=title(view)) for view in views])
st.html(f"<style>{STYLE}</style>")
st.title(chosen.title, anchor=False)
with errors_shown():
    chosen.run()
