"""Controls for the fields of a registered dataclass (a method, a workload), generated from what each field says of itself."""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable
from typing import Any

import ipywidgets as w
from traitlets import Any as AnyTrait

from workbench.errors import UserError

WIDE = {"description_width": "14em"}
_ROW = {"width": "34em"}
_MOST_NOTCHES = 256
"""Whole numbers of a wider range are written, not slid."""


class BudgetControl(w.HBox):
    """A budget: a fraction of the prompt, or tokens a kv head. `value` is a float or an int."""

    value = AnyTrait()

    def __init__(self, value: float | int, description: str = "budget", tooltip: str = ""):
        self.share = w.FloatSlider(
            0.2, min=0.01, max=1.0, step=0.01, description=description, tooltip=tooltip, style=WIDE, layout=_ROW
        )
        self.tokens = w.BoundedIntText(
            128, min=1, max=2**31 - 1, description=description, tooltip=tooltip, style=WIDE, layout=_ROW
        )
        self.unit = w.Dropdown(options=["fraction", "tokens"], layout={"width": "7em"})
        self._showing = False
        super().__init__([self.share, self.tokens, self.unit], value=value)
        self._show({"new": value})
        for control in (self.share, self.tokens, self.unit):
            control.observe(self._read, "value")
        self.observe(self._show, "value")

    def _read(self, _: Any) -> None:
        if not self._showing:  # else the half that was not moved yet would answer with its old value
            self.value = self.tokens.value if self.unit.value == "tokens" else self.share.value

    def _show(self, change: Any) -> None:
        value = change["new"]
        whole = isinstance(value, int)
        self._showing = True
        try:
            (self.tokens if whole else self.share).value = value
            self.unit.value = "tokens" if whole else "fraction"
        finally:
            self._showing = False
        self.share.layout.display = "none" if whole else None
        self.tokens.layout.display = None if whole else "none"


class OptionalControl(w.HBox):
    """A control that may be left out: `value` is None then."""

    value = AnyTrait()

    def __init__(self, inner: w.ValueWidget, value: Any):
        self.given = w.Checkbox(value is not None, indent=False, description="given", layout={"width": "6em"})
        self.inner = inner
        super().__init__([inner, self.given], value=value)
        for control in (self.given, inner):
            control.observe(self._read, "value")
        self.observe(self._show, "value")

    def _read(self, _: Any) -> None:
        self.value = self.inner.value if self.given.value else None

    def _show(self, change: Any) -> None:
        if change["new"] is not None:
            self.inner.value = change["new"]
        self.given.value = change["new"] is not None


class Form:
    """The controls of one class. `value` is an instance of it, as they stand."""

    def __init__(self, cls: type, changed: Callable[[], Any] = lambda: None):
        """`changed` is called after a control moved, once for a call of `set`."""
        self.cls = cls
        self.controls = {field.name: control_for(cls, field) for field in dataclasses.fields(cls)}
        self.widget = w.VBox(list(self.controls.values()))
        self._changed, self._setting = changed, False
        for control in self.controls.values():
            control.observe(self._moved, "value")

    @property
    def value(self) -> Any:
        """The instance. Raises UserError as its class does."""
        return self.cls(**{name: control.value for name, control in self.controls.items()})

    def set(self, **given: Any) -> None:
        """Moves controls. Raises UserError for a field there is not, and for a value its class refuses; nothing moves then."""
        for name in given:
            if name not in self.controls:
                known = f"there are {', '.join(self.controls)}" if self.controls else "it has none"
                raise UserError(f"{self.cls.name!r} has no knob {name!r}; {known}.")
        wanted = dataclasses.replace(self.value, **given)
        self._setting = True
        try:
            for name in given:
                self.controls[name].value = getattr(wanted, name)
        finally:
            self._setting = False
        self._changed()

    def _moved(self, _: Any) -> None:
        if not self._setting:
            self._changed()


def control_for(cls: type, field: dataclasses.Field) -> Any:
    """The control of a field, by its kind, range and choices. What it holds at first is the default."""
    about = field.metadata
    unit = f" ({about['unit']})" if about.get("unit") else ""
    words: dict[str, Any] = {"description": f"{field.name}{unit}", "tooltip": about.get("help") or field.name}
    if field.name == "budget":
        return BudgetControl(field.default, field.name, words["tooltip"])
    words |= {"style": WIDE, "layout": _ROW}
    if about.get("choices"):
        return w.Dropdown(options=list(about["choices"]), value=field.default, **words)
    kind = _kind(cls, field)
    if kind is bool:
        return w.Checkbox(field.default, **words)
    if kind is str:
        return w.Text(field.default or "", **words)
    inner = _number(kind, field.default, about.get("low"), about.get("high"), words)
    return OptionalControl(inner, None) if field.default is None else inner


def _number(kind: type, default: Any, low: float | None, high: float | None, words: dict[str, Any]) -> Any:
    if low is None or high is None:
        return (w.IntText if kind is int else w.FloatText)(default or kind(), **words)
    value = low if default is None else default
    if kind is int:
        sliding = high - low <= _MOST_NOTCHES
        return (w.IntSlider if sliding else w.BoundedIntText)(value, min=low, max=high, **words)
    step = (high - low) / 100
    notches = (value - low) / step
    if abs(notches - round(notches)) < 1e-9:  # a default between two notches could never be chosen again
        return w.FloatSlider(value, min=low, max=high, step=step, **words)
    return w.BoundedFloatText(value, min=low, max=high, **words)


def _kind(cls: type, field: dataclasses.Field) -> type:
    """What a field holds: the kind of its default, or of its annotation without None."""
    if field.default is not None:
        return type(field.default)
    hint = typing.get_type_hints(cls)[field.name]
    return next(kind for kind in typing.get_args(hint) if kind is not type(None))
