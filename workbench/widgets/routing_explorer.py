"""`wb.widgets.RoutingExplorer(trace)`: which experts were chosen, how evenly, how alike, and what a cache would save."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ipywidgets as w
import pandas as pd
import plotly.graph_objects as go

from workbench import plots
from workbench.cost.routing import expert_cache, layer_kinds
from workbench.errors import UserError
from workbench.plots.router_confidence import OF
from workbench.trace.display import table_html
from workbench.trace.schema import PHASES
from workbench.trace.trace import Trace
from workbench.widgets.door import Door, register
from workbench.widgets.picture import Picture

ALL = "all"
Shown = tuple[go.Figure, pd.DataFrame | None]


@register
class RoutingExplorer(Door):
    """Choose a view, the phase, layer and row it is about, and the slots of a cache of experts.

    `VIEWS` are the views. Lanes, pairs and confidence need a trace recorded with `routing="choices"`; the routers' margin and
    entropy one with `routing="logits"`.
    """

    def __init__(self, trace: Trace, view: str = "load"):
        """Shows a view at once. Raises UserError for a trace in which no expert was called."""
        self.trace = trace
        self.table: pd.DataFrame | None = trace.routing()
        """The numbers below the figure, if it has some."""
        layers = [int(layer) for layer in self.table["layer"]]
        phases = set(trace.table("steps")["phase"])
        rows = sorted(set(trace.arrow("choices")["row"].to_pylist())) or [0]
        last = max(trace.arrow("choices")["position"].to_pylist(), default=0)
        most = int(layer_kinds(trace.anatomy)["experts"].max())
        self.view = w.Dropdown(options=list(VIEWS), description="view")
        self.phase = w.Dropdown(options=[ALL, *(phase for phase in PHASES if phase in phases)], description="phase")
        self.layer = w.Dropdown(options=[ALL, *layers], description="layer")
        self.row = w.Dropdown(options=rows, description="row")
        self.tokens = w.IntRangeSlider(value=(0, last), min=0, max=last, description="tokens", continuous_update=False)
        self.slots = w.IntSlider(max(1, most // 2), min=1, max=most, description="slots", continuous_update=False)
        self.of = w.Dropdown(options=list(OF), description="confidence")
        self.picture, self._table, self._setting = Picture(), w.HTML(), False
        self._controls = {name: getattr(self, name) for name in ("view", "phase", "layer", "row", "tokens", "slots", "of")}
        super().__init__([w.HBox(list(self._controls.values()), layout={"flex_flow": "row wrap"}), self.picture, self._table])
        self.choose(view=view)
        for control in self._controls.values():
            control.observe(self._moved, "value")

    @property
    def selected(self) -> Trace:
        """The part of the trace in the chosen phase."""
        return self.trace if self.phase.value == ALL else self.trace.select(phase=self.phase.value)

    def choose(self, **chosen: Any) -> None:
        """Shows another `view`, `phase`, `layer`, `row`, part of the text (`tokens`, a range), `slots`, or confidence (`of`).

        `"all"` is every phase or layer. Raises UserError for what there is not, and where the trace lacks what a view needs;
        nothing changes then.
        """
        for name, value in chosen.items():
            self._check(name, value)
        before = {name: control.value for name, control in self._controls.items()}
        if "tokens" in chosen:
            chosen["tokens"] = (min(chosen["tokens"]), max(chosen["tokens"]))
        try:
            self._set(chosen)
            self.redraw()
        except UserError:
            self._set(before)
            raise
        self.say(None)

    def redraw(self) -> None:
        """Shows what the controls say. Raises UserError if there is nothing to show."""
        figure, self.table = VIEWS[self.view.value](self)
        self.picture.draw(figure)
        self._table.value = "" if self.table is None else table_html(self.table)

    def _check(self, name: str, value: Any) -> None:
        if name not in self._controls:
            raise UserError(f"{name!r} cannot be chosen here; there are {', '.join(self._controls)}.")
        control = self._controls[name]
        if isinstance(control, w.Dropdown):
            if value not in control.options:
                raise UserError(f"{value!r} cannot be chosen as {name}; there are {', '.join(map(str, control.options))}.")
            return
        ends = (value, value) if isinstance(value, int) else tuple(value)[:: max(1, len(value) - 1)]
        if not ends or not all(control.min <= end <= control.max for end in ends):
            raise UserError(f"{name} cannot be {value}; choose from {control.min} to {control.max}.")

    def _set(self, values: dict[str, Any]) -> None:
        self._setting = True
        try:
            for name, value in values.items():
                self._controls[name].value = value
        finally:
            self._setting = False

    def _moved(self, _: Any) -> None:
        if not self._setting:
            with self.trying():
                self.redraw()


def _layer(shown: RoutingExplorer) -> int | None:
    return None if shown.layer.value == ALL else shown.layer.value


def _load(shown: RoutingExplorer) -> Shown:
    return plots.expert_load(shown.selected), shown.selected.routing()


def _lanes(shown: RoutingExplorer) -> Shown:
    first, last = shown.tokens.value
    return plots.routing_lanes(shown.selected, shown.row.value, range(first, last + 1)), None


def _cache(shown: RoutingExplorer) -> Shown:
    phase = None if shown.phase.value == ALL else shown.phase.value
    return plots.expert_cache_hits(shown.trace, phase=phase), expert_cache(shown.trace, [shown.slots.value], phase=phase)


VIEWS: dict[str, Callable[[RoutingExplorer], Shown]] = {
    "load": _load,
    "lanes": _lanes,
    "pairs": lambda shown: (plots.co_activation(shown.selected, _layer(shown)), None),
    "in flight": lambda shown: (plots.unique_experts(shown.selected, _layer(shown)), None),
    "expert cache": _cache,
    "confidence": lambda shown: (plots.router_confidence(shown.selected, shown.of.value), None),
}
