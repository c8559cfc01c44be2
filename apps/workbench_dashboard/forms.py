"""Inputs for any registered dataclass, made from what its fields say of themselves: a new method needs no line here."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any, TypeVar

import streamlit as st

import workbench as wb
from workbench.errors import UserError
from workbench.methods.base import SLOTS, Budget, Method
from workbench_dashboard.plain import as_markdown

T = TypeVar("T")

NONE = "none"
"""What a slot says that no method fills."""

_OF_PROMPT, _IN_TOKENS = "share", "tokens"


def dataclass_inputs(cls: type[T], key: str, leave_out: Iterable[str] = ()) -> T:
    """One input a field, with its default, and the instance they make. Raises UserError as the class does."""
    fields = [field for field in dataclasses.fields(cls) if field.name not in leave_out]
    return cls(**{field.name: _input(field, f"{key}.{cls.name}.{field.name}") for field in fields})


def method_inputs(key: str, slot: str, preselected: str = "") -> Method | None:
    """A choice among the methods of a slot, and the knobs of the one chosen. Raises UserError for knobs that do not go."""
    names = [name for name, cls in wb.METHODS.items() if cls.slot == slot]
    if "dense" not in names:
        names = [NONE, *names]
    first = preselected if preselected in names else names[0] if NONE in names else "dense"
    name = st.selectbox(f"{slot.capitalize()} method", names, index=names.index(first), key=f"{key}.{slot}")
    if name in (None, NONE):
        return None
    st.caption(as_markdown(wb.METHODS[name].summary()))
    return dataclass_inputs(wb.METHODS[name], key)


def setup_inputs(key: str, preselected: str = "") -> wb.Setup:
    """A method for each slot that has any. `preselected` is the name of a method."""
    filled = {cls.slot for cls in wb.METHODS.values()}
    methods = [method_inputs(key, slot, preselected) for slot in SLOTS if slot in filled]
    return wb.Setup(*(method for method in methods if method is not None and method.name != "dense"))


def budget_input(default: Budget, key: str, label: str = "Budget", help: str = "") -> Budget:
    """A share of the prompt or a number of tokens."""
    unit, amount = st.columns([1, 1], vertical_alignment="bottom")
    kinds = [_OF_PROMPT, _IN_TOKENS]
    chosen = unit.selectbox(
        f"{label} in", kinds, index=kinds.index(_IN_TOKENS if isinstance(default, int) else _OF_PROMPT), key=f"{key}.unit"
    )
    if chosen == _IN_TOKENS:
        tokens = default if isinstance(default, int) else 128
        return int(amount.number_input(label, value=tokens, min_value=1, step=16, key=f"{key}.tokens", help=help))
    share = default if isinstance(default, float) else 0.2
    return float(
        amount.number_input(label, value=share, min_value=0.01, max_value=1.0, step=0.05, key=f"{key}.share", help=help)
    )


def budgets_input(default: Iterable[Budget], key: str, label: str = "Budgets") -> list[Budget]:
    """Several budgets in one line. Raises UserError for what is no number; what a budget may be, methods say."""
    help = "Shares of the prompt (0.2) or tokens a kv head (128), separated by spaces."
    return [_budget(text) for text in st.text_input(label, " ".join(map(str, default)), key=key, help=help).split()]


def _budget(text: str) -> Budget:
    try:
        return int(text) if text.isdecimal() else float(text)
    except ValueError:
        raise UserError(f"A budget cannot be {text!r}; write a share such as 0.2, or a number of tokens such as 128.") from None


def _input(field: dataclasses.Field, key: str) -> Any:
    about = field.metadata
    unit, choices = about.get("unit", ""), about.get("choices", ())
    name = field.name.replace("_", " ").capitalize()
    label = as_markdown(f"{name} ({unit})" if unit else name)
    help = as_markdown(about.get("help", "")) or None
    if field.name == "budget":
        return budget_input(field.default, key, name, help or "")
    if choices:
        return st.selectbox(label, choices, index=choices.index(field.default), key=key, help=help)
    if isinstance(field.default, bool):
        return st.checkbox(label, field.default, key=key, help=help)
    if isinstance(field.default, str):
        return st.text_input(label, field.default, key=key, help=help)
    if field.default is None:
        kind = int if "int" in str(field.type) else float
        value = st.number_input(label, value=None, step=_step(kind(1)), key=key, help=help, placeholder="not set")
        return None if value is None else kind(value)
    kind = type(field.default)
    low, high = ((None if each is None else kind(each)) for each in (about.get("low"), about.get("high")))
    step = _step(field.default)
    value = st.number_input(label, value=field.default, min_value=low, max_value=high, step=step, key=key, help=help)
    return kind(field.default if value is None else value)


def _step(value: float) -> float | int:
    """A step that fits a default: whole numbers by one, others by about a tenth of theirs."""
    return 1 if isinstance(value, int) else 0.1 if value >= 0.5 else 0.01
