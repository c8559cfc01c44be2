"""`wb.widgets.ReplayExplorer(recording)`: any cache method at any budget on one recorded run, as far as a slider moves."""

from __future__ import annotations

import threading
import time
import traceback
from collections.abc import Iterable
from functools import partial
from typing import Any

import ipywidgets as w

from workbench import plots
from workbench.errors import UserError
from workbench.experiments.replay import replay, why_not
from workbench.methods.base import METHODS, Budget, Method, parse_method
from workbench.trace.recording import Recording
from workbench.trace.replay import Point, Replay
from workbench.widgets.choosers import Chooser
from workbench.widgets.door import Door, register
from workbench.widgets.picture import Picture

BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Where the curves of all methods have points."""
ALL = "all"


@register
class ReplayExplorer(Door):
    """What the chosen method would have read and lost, and the curves of all methods, which fill in as they are computed.

    `method` is the chosen one with its knobs, `replay` the curves so far with the chosen point, `computing_s` how long that
    point took, and `missing` says of each method that is not offered why.
    """

    def __init__(
        self,
        recording: Recording,
        method: Method | str | None = None,
        *,
        methods: Iterable[str] | None = None,
        budgets: Iterable[Budget] = BUDGETS,
    ):
        """Opens on a method, or on the first there is; `methods` and `budgets` are those of the curves (None: all).

        Raises:
            UserError: for a method that cannot be replayed on the recording, with the reason.
        """
        self.recording = recording
        self.missing = {name: why for name in METHODS if (why := why_not(recording, name)) is not None}
        offered = {name: cls for name, cls in METHODS.items() if name not in self.missing}
        self._known: dict[str, Point] = {}
        self._curves: dict[str, None] = {}
        self._computing, self._closing = threading.RLock(), threading.Event()
        self.computing_s = 0.0
        self._setting = False
        self._texts = recording.trace.table("tokens").drop_duplicates("position").sort_values("position")["text"].tolist()
        layers = [layer.layer for layer in recording.layers]
        self.chooser = Chooser("method", offered, changed=self._moved)
        self.layer = w.Dropdown(options=[ALL, *layers], description="layer")
        self.step = w.IntSlider(recording.steps - 1, min=0, max=recording.steps - 1, description="step")
        self.column = w.Dropdown(options=["mass_retained", "output_error"], description="curves of")
        self.kept, self.mass, self.lost, self.curves = (Picture() for _ in range(4))
        self._progress = w.Label()
        choices = [self.chooser.widget, w.HBox([self.layer, self.step])]
        side_by_side = w.HBox([self.mass, self.lost])
        for picture in side_by_side.children:
            picture.layout.width = "50%"
        super().__init__([*choices, self.kept, side_by_side, w.HBox([self.column, self._progress]), self.curves])
        name, knobs = self._offered(method)
        self._setting = True
        self.chooser.set(name, **knobs)
        self._setting = False
        self._draw_curves()
        self.redraw()
        for control in (self.layer, self.step):
            control.observe(lambda _: self._moved(), "value")
        self.column.observe(lambda _: self._draw_curves(), "value")
        wanted = list(offered if methods is None else methods)
        self._filling = threading.Thread(
            target=partial(self._fill, wanted, list(budgets)), name="workbench replay explorer", daemon=True
        )
        self._filling.start()

    @property
    def method(self) -> Method:
        """The chosen method. Raises UserError where its knobs do not go together."""
        return self.chooser.value

    @property
    def point(self) -> Point:
        """The chosen method at its budget, replayed."""
        return self._point(self.method)

    @property
    def replay(self) -> Replay:
        """The points of the curves so far, and the chosen one."""
        labels = dict.fromkeys([*self._curves, self.point.setup])
        return Replay.of(self.recording, [self._known[label] for label in labels])

    def choose(
        self,
        method: Method | str | None = None,
        *,
        layer: int | str | None = None,
        step: int | None = None,
        column: str | None = None,
        **knobs: Any,
    ) -> None:
        """Shows another method, budget, knob, layer (`"all"`) or step; what is not given stays.

        Raises:
            UserError: for what cannot be chosen, and why a method cannot be replayed; nothing changes then.
        """
        for control, value in ((self.layer, layer), (self.column, column)):
            if value is not None and value not in control.options:
                raise UserError(f"{value!r} cannot be chosen here; there are {', '.join(map(str, control.options))}.")
        if step is not None and not 0 <= step <= self.step.max:
            raise UserError(f"There is no step {step}; the decoded tokens are 0 to {self.step.max}.")
        name, given = self._offered(method)
        self._setting = True
        try:
            self.chooser.set(name, **given | knobs)
            for control, value in ((self.layer, layer), (self.step, step), (self.column, column)):
                if value is not None:
                    control.value = value
        finally:
            self._setting = False
        self.redraw()
        self.say(None)

    def redraw(self) -> None:
        """Shows what the controls say. Raises UserError where the chosen method cannot be replayed as it is set."""
        begun = time.perf_counter()
        point = self.point
        self.computing_s = time.perf_counter() - begun
        one = Replay.of(self.recording, [point])
        layer = None if self.layer.value == ALL else self.layer.value
        self.kept.draw(plots.replay_map(one, point.setup, point.budget, self.step.value, layer, self._texts))
        self.mass.draw(plots.replay_steps(one, point.setup, point.budget, layer))
        self.lost.draw(plots.replay_steps(one, point.setup, point.budget, layer, "output_error"))
        self._ring(point)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits for the curves. Raises TimeoutError."""
        self._filling.join(timeout_s)
        if self._filling.is_alive():
            raise TimeoutError(f"The curves are not done after {timeout_s} s.")

    def close(self) -> None:
        """Takes the explorer off the page and ends what it computes."""
        self._closing.set()
        with self._computing:
            super().close()

    def _draw_curves(self) -> None:
        """Draws the curves anew; a slider only moves the ring."""
        curves = Replay.of(self.recording, [self._known[label] for label in self._curves] or [self.point])
        figure = plots.replay_curves(curves, y=self.column.value)
        look = {"symbol": "circle-open", "size": 16, "line": {"width": 3}, "color": "#777777"}
        figure.add_scatter(mode="markers", name="chosen", marker=look, hovertemplate="chosen<br>%{y:.4f}<extra></extra>")
        self._curve_figure = figure
        self._ring(self.point)

    def _ring(self, point: Point) -> None:
        share = point.budget / self.recording.prompt_tokens if isinstance(point.budget, int) else point.budget
        ring = {"x": [share], "y": [float(getattr(point, self.column.value).mean())]}
        with self._computing:
            self._curve_figure.data[-1].update(ring)
            self.curves.draw(self._curve_figure)

    def _point(self, method: Method) -> Point:
        """A method at its budget, computed once."""
        with self._computing:  # a replay sets the number of torch's threads while it runs
            if method.label not in self._known:
                self._known[method.label] = replay(self.recording, [method], [method.budget]).points[0]
            return self._known[method.label]

    def _fill(self, names: list[str], budgets: list[Budget]) -> None:
        """Computes the curves, a point at a time so that a slider need not wait for more than one."""
        wanted = [METHODS[name]().with_budget(budget) for budget in budgets for name in names]
        try:
            for number, method in enumerate(wanted, 1):
                self._point(method)
                with self._computing:
                    if self._closing.is_set():
                        return
                    self._curves[method.label] = None
                    self._progress.value = f"{number} of {len(wanted)} points" if number < len(wanted) else ""
                    if number % len(names) == 0:
                        self._draw_curves()
        except Exception as error:  # a method of somebody's may fail in any way; what is drawn stays
            if not isinstance(error, UserError):
                traceback.print_exc()
            self.say(str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}")

    def _offered(self, method: Method | str | None) -> tuple[str | None, dict[str, Any]]:
        """As `_name_and_knobs`. Raises UserError for a method that cannot be replayed, with the reason."""
        name, knobs = _name_and_knobs(method)
        if name in self.missing:
            raise UserError(self.missing[name])
        return name, knobs

    def _moved(self) -> None:
        if not self._setting:
            with self.trying():
                self.redraw()


def _name_and_knobs(method: Method | str | None) -> tuple[str | None, dict[str, Any]]:
    """A method's name, and its knobs if they were given: a name alone leaves the form as it is."""
    if method is None or (isinstance(method, str) and ":" not in method):
        return method, {}
    method = parse_method(method) if isinstance(method, str) else method
    return method.name, {name: value for name, value in vars(method).items() if name != "calibration"}
