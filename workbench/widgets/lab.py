"""`wb.widgets.Lab(lm)`: a generation to look at while it goes on, and to change between two of its tokens."""

from __future__ import annotations

import html
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as w

from workbench import plots
from workbench.engine.setup import Method, Setup
from workbench.live import Player
from workbench.models.load import LM
from workbench.texts.prose import words
from workbench.trace.snapshot import HISTORY, Snapshot
from workbench.trace.trace import Trace
from workbench.widgets.choosers import SetupChooser, as_setup
from workbench.widgets.door import Door, register
from workbench.widgets.picture import Picture

PERIOD_S = 0.3
"""Seconds between two looks at the player."""
_REST = 2.0
"""Drawing and the run share an interpreter: for each second of drawing there are so many without."""
LAST = "the last"
COLUMNS = HISTORY[HISTORY.index("context") :]
"""What can be drawn over the calls of a run."""

Wished = Setup | Method | str | None
"""A setup, a method, or its text form such as `h2o:budget=0.2`."""


@register
class Lab(Door):
    """Prompt, methods and buttons; below, while tokens come, what is held, what it costs and the text.

    Every verb returns at once and takes effect between two tokens, also while a cell runs. What it runs is `snapshots`.
    """

    def __init__(self, lm: LM, prompt: str | None = None, setup: Wished = None, *, tokens: int = 128, follow: bool = False):
        """Nothing runs before `run`.

        Args:
            lm: the model; one run at a time uses it, others wait for their turn.
            prompt: the text to begin with; None is some prose.
            setup: the methods to begin with; None is dense.
            tokens: how many to decode at once.
            follow: whether a dense run is led along, for KL and agreement; it takes as long again.
        """
        self.lm = lm
        self._player = Player("lab", period_s=PERIOD_S)
        self._drawing, self._closing = threading.RLock(), threading.Event()
        self._drawn: Any = None
        self._told: str | None = None
        text = " ".join(words()[:150]) if prompt is None else prompt
        self.prompt = w.Textarea(text, description="prompt", rows=4, layout={"width": "auto"})
        self.tokens = w.BoundedIntText(tokens, min=1, max=10**6, description="tokens", layout={"width": "12em"})
        self.follow = w.Checkbox(follow, description="a dense run follows along")
        self.setup = SetupChooser(setup)
        self.question = w.Text(placeholder="a further question", layout={"width": "24em"})
        self.column = w.Dropdown(options=list(COLUMNS), value="kv_physical_bytes", description="draw")
        self.shown = w.Dropdown(options=[LAST], description="of run")
        self._status, self._texts = w.Label(self._player.status), w.HBox()
        self.curve, self.held, self.attention = Picture(), Picture(), Picture()
        self.experts = Picture() if any(layer.experts is not None for layer in lm.anatomy.layers) else None
        for control in (self.column, self.shown):
            control.observe(lambda _: self.draw(again=True), "value")
        verbs = {"Run": self.run, "Stop": self.stop, "Continue": self.play, "Swap": self.swap, "Branch": self.branch}
        buttons = [*(self._button(name, verb) for name, verb in verbs.items()), self.question, self._button("Ask", self.ask)]
        maps = [self.held, self.attention, *([self.experts] if self.experts else [])]
        choices = [self.prompt, w.HBox([self.tokens, self.follow]), self.setup.widget, w.HBox([*buttons, self._status])]
        super().__init__([*choices, self._texts, w.HBox([self.column, self.shown]), self.curve, *maps])
        threading.Thread(target=self._keep_drawing, name="workbench lab", daemon=True).start()

    @property
    def snapshots(self) -> Mapping[str, Snapshot]:
        """The latest snapshot of each run."""
        return self._player.snapshots

    @property
    def status(self) -> str:
        """What the player does: see `Player.status`."""
        return self._player.status

    @property
    def busy(self) -> bool:
        """Whether it runs or is about to."""
        return self._player.busy

    def run(self, prompt: str | None = None, setup: Wished = None, *, tokens: int | None = None) -> None:
        """Drops what was run and begins anew; what is given goes into the controls first."""
        if prompt is not None:
            self.prompt.value = prompt
        chosen = self._chosen(setup)
        self._player.start(self.lm, chosen, self.prompt.value, self._count(tokens), follow=self.follow.value)

    def stop(self) -> None:
        """Stops after the token at hand."""
        self._player.stop()

    def play(self, tokens: int | None = None) -> None:
        """Goes on."""
        self._player.play(self._count(tokens))

    def swap(self, setup: Wished = None, run: str | None = None) -> None:
        """Puts a setup, or the one in the controls, in charge of a run, or of the one shown, from the next token on."""
        self._player.swap(self._chosen(setup), self._named(run))

    def branch(self, setup: Wished = None, run: str | None = None) -> None:
        """Lets a copy of a run go on beside it under a setup, or under the one in the controls."""
        self._player.branch(self._chosen(setup), self._named(run))

    def ask(self, text: str | None = None, tokens: int | None = None) -> None:
        """Appends a further turn to every run, or what stands in the field, and goes on."""
        self._player.ask(self.question.value if text is None else text, self._count(tokens))

    def trace(self, run: str | None = None) -> Trace:
        """The trace of a run, or of the last one. Raises UserError while it goes on."""
        return self._player.trace(run)

    def wait(self, timeout_s: float | None = None) -> None:
        """Waits until nothing runs, and draws it. Raises TimeoutError."""
        self._player.wait(timeout_s)
        self.draw()

    def close(self) -> None:
        """Takes the lab off the page and ends what it runs."""
        self._closing.set()
        self._player.close()
        with self._drawing:
            super().close()

    def draw(self, again: bool = False) -> None:
        """Shows what is new since the last time, or everything."""
        with self._drawing:
            self._status.value = self._player.status
            if self._player.error != self._told:
                self._told = self._player.error
                self.say(self._told)
            snapshots = self._player.snapshots
            if (snapshots is self._drawn and not again) or not snapshots or self._closing.is_set():
                return
            self._drawn = snapshots
            names = (LAST, *snapshots)
            if self.shown.options != names:
                chosen = self.shown.value
                self.shown.options = names  # which chooses the first
                self.shown.value = chosen if chosen in names else LAST
            seen = snapshots.get(self.shown.value, next(reversed(snapshots.values())))
            self._show_texts(snapshots)
            self.curve.draw(plots.live_curve(snapshots, self.column.value))
            self.held.draw(plots.held_map(seen))
            self.attention.draw(plots.attention_map(seen))
            if self.experts is not None:
                self.experts.draw(plots.expert_load(seen))

    def _keep_drawing(self) -> None:
        took = 0.0
        while not self._closing.wait(max(PERIOD_S, _REST * took)):
            try:
                begun = time.monotonic()
                self.draw()
                took = time.monotonic() - begun
            except Exception as error:  # a figure that fails must not end the drawing of the others' next states
                traceback.print_exc()
                self.say(f"{type(error).__name__}: {error}")

    def _show_texts(self, snapshots: Mapping[str, Snapshot]) -> None:
        if len(self._texts.children) != len(snapshots):
            for old in self._texts.children:
                old.close()
            self._texts.children = [w.HTML(layout={"flex": "1"}) for _ in snapshots]
        for place, (name, seen) in zip(self._texts.children, snapshots.items(), strict=True):
            place.value = _text_html(name, seen)

    def _chosen(self, setup: Wished) -> Setup:
        if setup is not None:
            self.setup.set(as_setup(setup))
        return self.setup.value

    def _named(self, run: str | None) -> str | None:
        """The run that is meant, or the one shown; None for the last."""
        return run or (None if self.shown.value == LAST else self.shown.value)

    def _count(self, tokens: int | None) -> int:
        return self.tokens.value if tokens is None else tokens

    def _button(self, name: str, verb: Callable[[], None]) -> w.Button:
        def press(_: Any) -> None:
            with self.trying():
                verb()

        button = w.Button(description=name, layout={"width": "auto"})
        button.on_click(press)
        return button


def _text_html(name: str, seen: Snapshot) -> str:
    """What a run wrote, as text whatever it holds; control characters show as Python writes them."""
    text = "".join(each if each.isprintable() or each in "\n\t" else repr(each)[1:-1] for each in seen.new_text)
    style = "white-space:pre-wrap; max-height:14em; overflow:auto; margin:0"
    return f"<b>{html.escape(f'{name}: {seen.setup}')}</b><pre style='{style}'>{html.escape(text)}</pre>"
