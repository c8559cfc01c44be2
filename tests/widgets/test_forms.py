"""Controls come from the registry alone, read back what they show, and refuse what a class refuses."""

from __future__ import annotations

import dataclasses
import html
from dataclasses import dataclass

import pytest

import workbench as wb

pytest.importorskip("ipywidgets", reason="needs the extra `notebook`")
from workbench.methods import Budget, CacheMethod, budget_knob, knob
from workbench.methods.base import SLOTS
from workbench.widgets.choosers import Chooser, SetupChooser
from workbench.widgets.forms import Form
from workbench.workloads import WORKLOADS

REGISTERED = [*wb.METHODS.values(), *WORKLOADS.values()]


@pytest.mark.parametrize("cls", REGISTERED, ids=lambda cls: cls.name)
def test_a_form_of_every_registered_class_reads_back_its_defaults(cls):
    form = Form(cls)
    assert form.value == cls()
    assert list(form.controls) == [field.name for field in dataclasses.fields(cls)]
    for field in dataclasses.fields(cls):
        tooltip = getattr(form.controls[field.name], "tooltip", None)
        assert tooltip is None or tooltip == (field.metadata.get("help") or field.name)


@dataclass(frozen=True)
class Invented(CacheMethod):
    """Is known to nothing but its own fields."""

    name, paper = "invented", "none"
    budget: Budget = budget_knob(64)
    share: float = knob(0.25, low=0.0, high=1.0, unit="share", help="How much.")
    rate: float = knob(1e-4, low=0.0, high=1.0)
    few: int = knob(3, low=0, high=8, unit="tokens")
    many: int = knob(3, low=0, high=10**6)
    kind: str = knob("a", choices=("a", "b"))
    words: str = knob("free")
    on: bool = knob(True)


def test_kinds_of_knobs_have_controls_of_their_kind():
    form = Form(Invented)
    kinds = {name: type(control).__name__ for name, control in form.controls.items()}
    assert kinds == {
        "budget": "BudgetControl",
        "share": "FloatSlider",
        "rate": "BoundedFloatText",
        "few": "IntSlider",
        "many": "BoundedIntText",
        "kind": "Dropdown",
        "words": "Text",
        "on": "Checkbox",
    }
    assert form.controls["share"].description == "share (share)" and form.controls["share"].tooltip == "How much."
    assert (form.controls["few"].min, form.controls["few"].max) == (0, 8)


def test_a_budget_is_a_fraction_or_tokens():
    form = Form(wb.H2O)
    control = form.controls["budget"]
    control.share.value = 0.35
    assert form.value.budget == 0.35
    control.unit.value = "tokens"
    control.tokens.value = 48
    assert form.value.budget == 48 and isinstance(form.value.budget, int)
    assert control.share.layout.display == "none"
    form.set(budget=0.5)
    assert control.unit.value == "fraction" and form.value.budget == 0.5


def test_what_is_set_moves_the_controls_once_and_what_is_refused_moves_none():
    moved = []
    form = Form(wb.SnapKV, lambda: moved.append(form.value))
    form.set(window=16, pooling="max")
    assert moved == [wb.SnapKV(window=16, pooling="max")] and form.controls["window"].value == 16
    with pytest.raises(wb.UserError, match="cannot be 5000"):
        form.set(kernel=3, window=5000)
    with pytest.raises(wb.UserError, match="has no knob 'widow'"):
        form.set(widow=1)
    assert form.value == wb.SnapKV(window=16, pooling="max") and len(moved) == 1
    form.controls["kernel"].value = 3
    assert moved[-1].kernel == 3


def test_a_setting_may_be_left_out():
    form = Form(wb.workloads.recall)
    assert form.value.depth is None
    form.set(depth=0.5)
    assert form.value.depth == 0.5 and form.controls["depth"].given.value
    form.controls["depth"].given.value = False
    assert form.value.depth is None


def test_a_chooser_offers_what_is_registered_and_keeps_each_form():
    chooser = Chooser("method", dict(wb.METHODS.items()), "snapkv")
    assert list(chooser.name.options) == list(wb.METHODS)
    chooser.set(window=8)
    chooser.name.value = "dense"
    assert chooser.value == wb.Dense()
    chooser.name.value = "snapkv"
    assert chooser.value == wb.SnapKV(window=8)
    assert html.escape(wb.SnapKV.summary()) in chooser.summary.value
    with pytest.raises(wb.UserError, match="cannot be chosen here"):
        chooser.set("nope")
    with pytest.raises(wb.UserError, match="cannot be 'x'"):
        chooser.set("h2o", recent="x")
    assert chooser.value == wb.SnapKV(window=8), "nothing changed"


def test_a_setup_has_a_method_for_each_slot_that_has_any():
    chooser = SetupChooser("h2o:budget=64")
    filled = {cls.slot for cls in wb.METHODS.values()}
    assert list(chooser.slots) == [slot for slot in SLOTS if slot in filled]
    assert chooser.value == wb.Setup(wb.H2O(budget=64))
    chooser.set(None)
    assert chooser.value.label == "dense"
