"""`wb.widgets.CompareExplorer(comparison)`: quality against cost on chosen axes, by method, by turn, and what was kept."""

from __future__ import annotations

from typing import Any

import ipywidgets as w

from workbench import plots
from workbench.errors import UserError
from workbench.plots.pareto import HIGHER_IS_BETTER
from workbench.plots.score_map import score_map
from workbench.report import table_html
from workbench.trace.comparison import Comparison
from workbench.widgets.door import Door, register
from workbench.widgets.picture import Picture


@register
class CompareExplorer(Door):
    """The table of a comparison, a chart with axes to choose, maps and scores by turn, and what a chosen setup kept."""

    def __init__(self, comparison: Comparison):
        self.comparison = comparison
        numbers = list(comparison.table.select_dtypes("number").columns)
        wide = {"description_width": "6em"}
        self.x = w.Dropdown(options=numbers, value="kv_physical_bytes", description="cost", style=wide)
        self.y = w.Dropdown(options=numbers, value="score", description="quality", style=wide)
        self.column = w.Dropdown(options=list(HIGHER_IS_BETTER), description="map of", style=wide)
        self.setup = w.Dropdown(options=list(comparison.traces), description="kept by", style=wide)
        self.pareto, self.scores, self.turns, self.kept = (Picture() for _ in range(4))
        self._controls = {"x": self.x, "y": self.y, "column": self.column, "setup": self.setup}
        self._setting = False
        table = w.HTML(table_html(comparison))
        rows = [table, w.HBox([self.x, self.y]), self.pareto, self.column, self.scores, self.turns, self.setup, self.kept]
        super().__init__(rows)
        with self.trying():
            self.redraw()
        for control in self._controls.values():
            control.observe(self._moved, "value")

    def choose(self, **chosen: str) -> None:
        """Chooses the axes `x` and `y`, the `column` of the map, or the `setup` whose kept tokens are shown.

        Raises:
            UserError: for what cannot be chosen; nothing changes then.
        """
        for name, value in chosen.items():
            if name not in self._controls:
                raise UserError(f"{name!r} cannot be chosen here; there are {', '.join(self._controls)}.")
            options = self._controls[name].options
            if value not in options:
                raise UserError(f"{value!r} cannot be chosen as {name}; there are {', '.join(options)}.")
        self._setting = True
        try:
            for name, value in chosen.items():
                self._controls[name].value = value
        finally:
            self._setting = False
        self.redraw()
        self.say(None)

    def redraw(self) -> None:
        """Shows what the controls say. Raises UserError where the comparison lacks it; the rest is drawn."""
        self.pareto.draw(plots.pareto(self.comparison, self.x.value, self.y.value))
        self.turns.draw(plots.turn_scores(self.comparison))
        if self.setup.value is not None:
            self.kept.draw(plots.cache_map(self.comparison.traces[self.setup.value]))
        self.scores.draw(score_map(self.comparison, self.column.value))

    def _moved(self, _: Any) -> None:
        if not self._setting:
            with self.trying():
                self.redraw()
