"""Choosing from a registry: an entry by its name, and its knobs below; and a setup, an entry a slot."""

from __future__ import annotations

import dataclasses
import html
from collections.abc import Callable, Mapping
from typing import Any

import ipywidgets as w

from workbench.engine.setup import Method, Setup
from workbench.errors import UserError
from workbench.methods.base import METHODS, SLOTS, parse_setup
from workbench.widgets.forms import WIDE, Form

_NONE = "none"


class Chooser:
    """A drop-down of registered classes with the form of the chosen one."""

    def __init__(
        self, title: str, entries: Mapping[str, type | None], name: str | None = None, changed: Callable[[], Any] = lambda: None
    ):
        """`entries` by name; None is an entry without a form. `changed` is called after each change."""
        self.entries = dict(entries)
        self.name = w.Dropdown(options=list(self.entries), description=title, style=WIDE)
        self.summary = w.HTML()
        self._forms: dict[str, Form] = {}
        self._place = w.VBox()
        self.widget = w.VBox([self.name, self.summary, self._place])
        self._changed, self._setting = lambda: None, False
        if name is not None:
            self.name.value = name
        self._show()
        self._changed = changed
        self.name.observe(self._moved, "value")

    @property
    def form(self) -> Form | None:
        """The form of the chosen entry; each keeps what was set in it."""
        name = self.name.value
        cls = self.entries[name]
        if cls is not None and name not in self._forms:
            self._forms[name] = Form(cls, self._form_changed)
        return self._forms.get(name)

    @property
    def value(self) -> Any:
        """An instance of the chosen class, or None. Raises UserError as the class does."""
        return None if self.form is None else self.form.value

    def set(self, name: str | None = None, **knobs: Any) -> None:
        """Chooses an entry and sets knobs. Raises UserError for what there is not; nothing changes then."""
        before = self.name.value
        name = before if name is None else name
        if name not in self.entries:
            raise UserError(f"{name!r} cannot be chosen here; there are {', '.join(self.entries)}.")
        self._setting = True
        try:
            self.name.value = name
            if knobs and self.form is None:
                raise UserError(f"{name!r} has no knobs.")
            if knobs:
                self.form.set(**knobs)
        except UserError:
            self.name.value = before
            raise
        finally:
            self._setting = False
        self._changed()

    def _moved(self, _: Any) -> None:
        self._show()
        self._form_changed()

    def _form_changed(self) -> None:
        if not self._setting:
            self._changed()

    def _show(self) -> None:
        form = self.form
        self.summary.value = "" if form is None else f"<small>{html.escape(form.cls.summary())}</small>"
        self._place.children = () if form is None else (form.widget,)


class SetupChooser:
    """A method a slot, for every slot that has one."""

    def __init__(self, setup: Setup | Method | str | None = None):
        self.slots: dict[str, Chooser] = {}
        for slot in SLOTS:
            methods = {name: cls for name, cls in METHODS.items() if cls.slot == slot}
            if methods:
                first = {} if "dense" in methods else {_NONE: None}
                self.slots[slot] = Chooser(slot, first | methods, "dense" if "dense" in methods else _NONE)
        self.widget = w.VBox([chooser.widget for chooser in self.slots.values()])
        self.set(setup)

    @property
    def value(self) -> Setup:
        """The setup. Raises UserError as its methods do."""
        chosen = [chooser.value for chooser in self.slots.values()]
        return Setup(*(method for method in chosen if method is not None))

    def set(self, setup: Setup | Method | str | None) -> None:
        """Puts a setup into the controls; what it does not say goes back to none."""
        setup = as_setup(setup)
        for slot, chooser in self.slots.items():
            method = setup.methods.get(slot)
            if method is None:
                chooser.set("dense" if "dense" in chooser.entries else _NONE)
            else:
                chooser.set(method.name, **{knob.name: getattr(method, knob.name) for knob in dataclasses.fields(method)})


def as_setup(given: Setup | Method | str | None) -> Setup:
    """A setup from whatever names one, a method's text form such as `h2o:budget=0.2` included."""
    return parse_setup(given) if isinstance(given, str) else Setup.of(given)
