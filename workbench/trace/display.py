"""How values show in a notebook: as text and as HTML, both at once, so that each front end takes what it can."""

from __future__ import annotations

import html
from typing import Any

import pandas as pd


class RichDisplay:
    """What defines `_repr_html_` and `__repr__` shows as both."""

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(repr(self))}</b></p>"

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, str]:
        """The value by MIME type; IPython leaves out what it was not asked for."""
        return {"text/plain": repr(self), "text/html": self._repr_html_()}


def table_html(table: pd.DataFrame) -> str:
    """A table of any texts as HTML that shows them as text."""
    return table.to_html(index=False, border=0, escape=True)
