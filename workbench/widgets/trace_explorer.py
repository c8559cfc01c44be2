"""`wb.widgets.TraceExplorer(trace)`: a trace, or a part of it, as tables and figures, and questions to it in SQL."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from typing import Any

import ipywidgets as w
import pandas as pd
import plotly.graph_objects as go

from workbench import plots
from workbench.errors import UserError
from workbench.trace.display import table_html
from workbench.trace.schema import PHASES
from workbench.trace.trace import Trace
from workbench.widgets.door import Door, register
from workbench.widgets.picture import Picture

ALL = "all"
MAX_ROWS = 200
"""Rows of a table that are sent."""

VIEWS: dict[str, Callable[[Trace], pd.DataFrame | go.Figure]] = {
    "summary": Trace.summary,
    "components, FLOPs": plots.components,
    "components, bytes": lambda trace: plots.components(trace, "bytes"),
    "KV bytes": plots.kv_bytes,
    "cache map": plots.cache_map,
    "importance": plots.importance_map,
}
_QUESTION = "select phase, count(*) as calls, median(duration_ns) / 1e6 as median_ms from steps group by phase"


@register
class TraceExplorer(Door):
    """Choose a view and the part of the trace it shows; ask the whole trace in SQL."""

    def __init__(self, trace: Trace, view: str = "summary"):
        """Shows a view at once: one of `VIEWS`."""
        self.trace = trace
        self.table: pd.DataFrame | None = None
        """What is shown if it is a table; None while a figure is shown."""
        steps = trace.table("steps")
        present = [phase for phase in PHASES if phase in set(steps["phase"])]
        first, last = (int(steps["step"].min()), int(steps["step"].max())) if len(steps) else (0, 0)
        layers = [layer.index for layer in trace.anatomy.layers]
        self.view = w.Dropdown(options=list(VIEWS), description="view")
        self.phase = w.Dropdown(options=[ALL, *present], description="phase")
        self.steps = w.IntRangeSlider(value=(first, last), min=first, max=last, description="steps", continuous_update=False)
        self.layers = w.SelectMultiple(options=layers, value=layers, rows=min(4, len(layers)), description="layers")
        self.query = w.Textarea(_QUESTION, description="SQL", rows=2, layout={"width": "auto"})
        self._ask = w.Button(description="Ask")
        self.picture = Picture()
        self._table, self._answer, self._setting = w.HTML(), w.HTML(), False
        self._controls = (self.view, self.phase, self.steps, self.layers)
        super().__init__([w.HBox(self._controls), self._table, self.picture, self.query, self._ask, self._answer])
        self.choose(view)
        for control in self._controls:
            control.observe(self._moved, "value")
        self._ask.on_click(self._pressed)

    @property
    def selected(self) -> Trace:
        """The part that is shown."""
        first, last = self.steps.value
        layers = self.layers.value
        return self.trace.select(
            phase=None if self.phase.value == ALL else self.phase.value,
            steps=None if self.steps.value == (self.steps.min, self.steps.max) else range(first, last + 1),
            layers=None if len(layers) == len(self.layers.options) else layers,
        )

    def choose(
        self,
        view: str | None = None,
        *,
        phase: str | None = None,
        steps: range | str | None = None,
        layers: Sequence[int] | str | None = None,
    ) -> None:
        """Shows another view or part; `"all"` takes a restriction away, what is not given stays.

        Raises:
            UserError: for a view, phase or layer there is not, and where the part has nothing to show; nothing changes then.
        """
        whole = (self.steps.min, self.steps.max)
        every = self.layers.options
        wanted: dict[Any, Any] = {
            self.view: view,
            self.phase: phase,
            self.steps: whole if steps == ALL else None if steps is None else (min(steps), max(steps)),
            self.layers: every if layers == ALL else None if layers is None else tuple(layers),
        }
        if view is not None and view not in VIEWS:
            raise UserError(f"There is no view {view!r}; there are {', '.join(VIEWS)}.")
        if phase is not None and phase not in self.phase.options:
            raise UserError(f"This trace has no phase {phase!r}; it has {', '.join(self.phase.options[1:])}.")
        if not set(wanted[self.layers] or ()) <= set(every):
            raise UserError(f"This trace has no layers {layers}; it has {', '.join(map(str, every))}.")
        before = {control: control.value for control in self._controls}
        try:
            self._set({control: value for control, value in wanted.items() if value is not None})
            self.redraw()
        except UserError:
            self._set(before)
            raise
        self.say(None)

    def redraw(self) -> None:
        """Shows what the controls say. Raises UserError if there is nothing to show."""
        shown = VIEWS[self.view.value](self._something(self.selected))
        if isinstance(shown, pd.DataFrame):
            self.table, self._table.value = shown, _limited_html(shown)
        else:
            self.table, self._table.value = None, ""
            self.picture.draw(shown)
        self.picture.layout.display = "none" if self.table is not None else None

    def sql(self, query: str) -> pd.DataFrame:
        """Asks the whole trace, shows the first rows and returns all. Raises UserError as `Trace.sql` does."""
        rows = self.trace.sql(query)
        self.query.value, self._answer.value = query, _limited_html(rows)
        return rows

    def _something(self, trace: Trace) -> Trace:
        if not trace.arrow("steps").num_rows:
            raise UserError("No forward call lies in this part of the trace; choose another phase or more steps.")
        return trace

    def _set(self, values: dict[Any, Any]) -> None:
        self._setting = True
        try:
            for control, value in values.items():
                control.value = value
        finally:
            self._setting = False

    def _moved(self, _: Any) -> None:
        if not self._setting:
            with self.trying():
                self.redraw()

    def _pressed(self, _: Any) -> None:
        with self.trying():
            self.sql(self.query.value)


def _limited_html(rows: pd.DataFrame) -> str:
    """The first rows; how many there are, if more."""
    more = f"<p>{html.escape(f'The first {MAX_ROWS} of {len(rows):,} rows.')}</p>" if len(rows) > MAX_ROWS else ""
    return table_html(rows.head(MAX_ROWS)) + more
