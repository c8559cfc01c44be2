"""A recording that one browser session works with, and what was replayed on it so far."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

import workbench as wb
from workbench.experiments.replay import why_not
from workbench.methods.base import Method
from workbench.trace.recording import Recording
from workbench.trace.replay import Point, Replay

BUDGETS = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
"""Where the curves of all methods have points, as shares of the prompt."""
MOST_POINTS = 400
"""Points that are kept; the oldest give way."""


class ReplayBench:
    """What was replayed is known from then on, so that a slider that goes back answers at once."""

    def __init__(self, recording: Recording):
        self.recording = recording
        self.missing = {name: why for name in wb.METHODS if (why := why_not(recording, name)) is not None}
        """Why each method that cannot be replayed here is not offered."""
        self.offered = [name for name in wb.METHODS if name not in self.missing]
        tokens = recording.trace.table("tokens").drop_duplicates("position").sort_values("position")
        self.texts: list[str | None] = tokens["text"].tolist()
        self.check: tuple[tuple[str, ...], wb.Check] | None = None
        """The setups that stood beside the last live runs, and these."""
        self._known: dict[str, Point] = {}
        self._one_at_a_time = threading.Lock()

    def point(self, method: Method) -> Point:
        """A method at its budget. Raises UserError where it cannot be replayed as it is set."""
        with self._one_at_a_time:  # a replay sets the number of torch's threads while it runs
            if method.label not in self._known:
                self._known[method.label] = wb.replay(self.recording, [method], [method.budget]).points[0]
                while len(self._known) > MOST_POINTS:
                    self._known.pop(next(iter(self._known)))
            return self._known[method.label]

    def replay(self, methods: Sequence[Method]) -> Replay:
        """These methods, each at its budget."""
        return Replay.of(self.recording, {method.label: self.point(method) for method in methods}.values())

    def curves(self, names: Sequence[str], seconds: float) -> tuple[list[Method], bool]:
        """Methods at all of `BUDGETS` that are known after so many more seconds, and whether these are all."""
        wanted = [wb.METHODS[name]().with_budget(budget) for budget in BUDGETS for name in names]
        until = time.monotonic() + seconds
        for place, method in enumerate(wanted):
            if place and method.label not in self._known and time.monotonic() > until:
                return wanted[:place], False
            self.point(method)
        return wanted, True
