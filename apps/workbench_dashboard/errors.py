"""What goes wrong is said in one place and one way: a sentence on the page, and a traceback on standard error only."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager

import streamlit as st

from workbench.errors import UserError
from workbench_dashboard.plain import as_markdown


@contextmanager
def errors_shown() -> Iterator[None]:
    """Shows what is raised in the block; also a decorator, for fragments, which run outside the app's own block."""
    try:
        yield
    except UserError as error:
        show_error(str(error))
    except Exception as error:
        traceback.print_exc()
        show_error(f"{type(error).__name__}: {error}")


def show_error(sentence: str) -> None:
    """An error box that holds a sentence as it is written."""
    st.error(as_markdown(sentence))
