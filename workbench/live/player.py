"""Plays runs in a thread of its own, a token of each in turn, and publishes what there is to see of them."""

from __future__ import annotations

import queue
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

from workbench.engine.session import Prompt
from workbench.engine.setup import Method, Setup
from workbench.errors import UserError
from workbench.live.line import line_of
from workbench.live.run import LiveRun
from workbench.models.load import LM
from workbench.trace.snapshot import Snapshot
from workbench.trace.trace import Trace

PERIOD_S = 0.25
"""Least time between two snapshots: four a second are smooth, and take a small part of a run's time."""


@dataclass(frozen=True)
class _Order:
    """Something to do between two tokens, and what `status` says meanwhile.

    `lm` is the model that it changes to, and `tokens` what is to be decoded from then on; without, what was to be is.
    """

    status: str
    action: Callable[[], object]
    lm: LM | None = None
    tokens: int | None = None
    stops: int = 0
    """How often there had been a stop when this was ordered: a later one ends it, whatever is ordered after that."""


class Player:
    """What a door holds of its runs: buttons call its verbs, and whoever draws reads `snapshots`, `status` and `error`.

    Every verb returns at once and takes effect between two tokens. The model is used by one player at a time: `status` says
    how many are before this one. All runs are branches of one, on one model.
    """

    def __init__(self, name: str = "run", *, period_s: float = PERIOD_S, unwatched_s: float | None = None):
        """Starts the thread, which ends with `close`.

        Args:
            name: who plays, as others in the line see it.
            period_s: least seconds between two snapshots.
            unwatched_s: seconds without a call of `watch` after which it stops playing; None plays on.
        """
        self.name = name
        self.snapshots: Mapping[str, Snapshot] = MappingProxyType({})
        """The latest snapshot of each run; a new mapping each time."""
        self.status = "idle"
        """`idle`, `waiting: N before you`, `reading`, `running` or `closed`."""
        self.error: str | None = None
        """What stopped it, in a sentence; None if nothing did."""
        self._period_s, self._unwatched_s = period_s, unwatched_s
        self.lm: LM | None = None
        """The model of the runs, or the one that a new run waits for."""
        self._runs: dict[str, LiveRun] = {}
        self._left = 0
        self._stops = self._left_since = 0
        """How often there was a stop, and had been one when the tokens that are left were ordered."""
        self._published = 0.0
        self._watched = time.monotonic()
        self._orders: queue.SimpleQueue[_Order] = queue.SimpleQueue()
        self._handing_over = threading.Lock()
        self._closed, self._idle = threading.Event(), threading.Event()
        self._idle.set()
        threading.Thread(target=self._work, name=f"workbench {name}", daemon=True).start()

    @property
    def busy(self) -> bool:
        """Whether it is playing or about to."""
        return not self._idle.is_set()

    def start(
        self,
        lm: LM,
        setup: Setup | Method | None,
        prompt: Prompt,
        tokens: int,
        *,
        follow: bool = False,
        importance: str = "decode",
    ) -> None:
        """Drops what was played, reads a prompt and decodes so many tokens; see `LiveRun` for the options."""

        def begin() -> None:
            self._runs, self._left = {}, 0
            self.snapshots = MappingProxyType({})
            run = LiveRun(lm, setup, follow=follow, importance=importance)
            run.read(prompt)
            self._runs = {run.name: run}

        self._order("reading", begin, lm, tokens)

    def play(self, tokens: int) -> None:
        """Decodes so many tokens more."""
        self._order("running", lambda: self._run(None), tokens=tokens)

    def stop(self) -> None:
        """Stops after the token at hand, or leaves the line; only `play` goes on from there. Orders not begun are dropped."""
        with self._handing_over:
            while not self._orders.empty():
                self._orders.get()
            self._stops += 1

    def swap(self, setup: Setup | Method | None, run: str | None = None) -> None:
        """Puts another setup in charge of a run, or of the last one, from its next token on."""
        self._order("running", lambda: self._run(run).swap(setup))

    def branch(self, setup: Setup | Method | None, run: str | None = None) -> None:
        """Lets a copy of a run, or of the last one, go on beside it under another setup."""

        def fork() -> None:
            name = f"branch {len(self._runs)}"
            other = self._run(run).branch(name)
            other.swap(setup)
            self._runs[name] = other

        self._order("running", fork)

    def ask(self, text: str, tokens: int) -> None:
        """Appends a further turn to every run and decodes so many tokens."""

        def further() -> None:
            self._run(None)
            for run in self._runs.values():
                run.ask(text)

        self._order("reading", further, tokens=tokens)

    def trace(self, run: str | None = None) -> Trace:
        """The trace of a run, or of the last one. Raises UserError if there is none, or it is playing."""
        if self.busy:
            raise UserError("The run is still going on; stop it before you take its trace.")
        return self._run(run).session.trace

    def watch(self) -> None:
        """Says that somebody still looks."""
        self._watched = time.monotonic()

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing plays. Raises TimeoutError."""
        if not self._idle.wait(timeout_s):
            raise TimeoutError(f"Still {self.status} after {timeout_s} s.")

    def close(self) -> None:
        """Ends the thread after the token at hand and lets go of the runs."""
        self.stop()
        self._closed.set()
        self._orders.put(_Order("closed", lambda: None))

    def _order(self, status: str, action: Callable[[], object], lm: LM | None = None, tokens: int | None = None) -> None:
        if self._closed.is_set():
            raise UserError("This player is closed; make a new one.")
        self.watch()
        with self._handing_over:
            self._idle.clear()
            self._orders.put(_Order(status, action, lm, tokens, self._stops))

    def _work(self) -> None:
        """Carries out orders until it is closed."""
        order = self._next()
        while not self._closed.is_set():
            self.error = None
            before, later = self.lm, None
            self.lm = lm = order.lm or before
            if lm is None:
                self.error = "There is no run yet; start one first."
            else:
                with line_of(lm.model).turn(self.name, partial(self._wanted, order), self._waiting) as mine:
                    later = self._play(order) if mine else None
                if not mine:
                    self.lm = before  # there still are the runs from before, on their model
            order = later or self._next()
        self._runs = {}
        self.status = "closed"
        self._idle.set()

    def _next(self) -> _Order:
        """The next order; idle until there is one."""
        with self._handing_over:
            if self._orders.empty():
                self.status = "idle"
                self._idle.set()
        # What `close` put there to wake this thread may have been taken between two tokens.
        return _Order("closed", lambda: None) if self._closed.is_set() else self._orders.get()

    def _play(self, order: _Order | None) -> _Order | None:
        """Carries out an order, then decodes what is left, obeying orders between tokens. Returns one for another model."""
        while order is not None or (self._left and self._left_since == self._stops):
            if order is not None and order.lm not in (None, self.lm):
                return order
            self._attempt(order or _Order("running", self._tick))
            order = None if self._orders.empty() else self._orders.get()
        self._publish()
        return None

    def _attempt(self, order: _Order) -> None:
        """Does it; what goes wrong ends the playing and is said in `error`."""
        self.status = order.status
        try:
            order.action()
            if order.tokens is not None:
                self._left, self._left_since = order.tokens, order.stops
        except UserError as error:
            self.error, self._left = str(error), 0
        except Exception as error:  # the thread must outlive whatever a method of somebody's does wrong
            traceback.print_exc()
            self.error, self._left = f"{type(error).__name__}: {error}", 0

    def _tick(self) -> None:
        """One token of each run that has not ended."""
        running = [run for run in self._runs.values() if not run.ended]
        for run in running:
            run.advance()
        self._left = self._left - 1 if running else 0
        if time.monotonic() - self._published > self._period_s:
            self._publish()
        if self._unwatched_s is not None and time.monotonic() - self._watched > self._unwatched_s:
            raise UserError(f"Stopped: nobody has looked for {self._unwatched_s:g} s; continue to go on.")

    def _publish(self) -> None:
        self.snapshots = MappingProxyType({name: run.snapshot() for name, run in self._runs.items()})
        self._published = time.monotonic()

    def _run(self, name: str | None) -> LiveRun:
        """A run, or the last one. Raises UserError if there is none."""
        if not self._runs:
            raise UserError("There is no run yet; start one first.")
        if name is not None and name not in self._runs:
            raise UserError(f"There is no run {name!r}; there are {', '.join(self._runs)}.")
        return self._runs[name or next(reversed(self._runs))]

    def _wanted(self, order: _Order) -> bool:
        return order.stops == self._stops

    def _waiting(self, before: int) -> None:
        self.status = f"waiting: {before} before you"
