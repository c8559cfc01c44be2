"""The lab: buttons and verbs play the runs, figures follow, and closing it ends them."""

from __future__ import annotations

import threading
import time

import pytest

import workbench as wb

pytest.importorskip("ipywidgets", reason="needs the extra `notebook`")

PROMPT = "The statement is executed once for every item. " * 4


@pytest.fixture
def lab(tiny):
    opened = wb.widgets.Lab(tiny, PROMPT, "snapkv:budget=0.5", tokens=6)
    yield opened
    opened.close()


def until(condition) -> None:
    while not condition():
        time.sleep(0.01)


def press(lab, name: str) -> None:
    """Presses a button as the page would."""
    found = [button for button in _inside(lab) if getattr(button, "description", None) == name and hasattr(button, "click")]
    found[0].click()


def _inside(widget):
    for child in getattr(widget, "children", ()):
        yield child
        yield from _inside(child)


def test_it_runs_and_draws(lab):
    lab.run()
    lab.wait(60)
    seen = lab.snapshots["run"]
    assert len(seen.history) == 7 and seen.setup == "snapkv(budget=0.5)"
    assert lab.curve.figure.data[0].y[-1] == seen.history["kv_physical_bytes"].iloc[-1]
    assert lab.held.figure.data[0].z.shape == seen.held.shape
    assert seen.new_text.split()[0] in lab._texts.children[0].value
    lab.column.value = "entropy"
    assert len(lab.curve.figure.data[0].y) == seen.history["entropy"].notna().sum()
    assert lab.trace().setup == "snapkv(budget=0.5)" and lab.experts is None


def test_it_draws_by_itself_while_it_runs(lab):
    lab.run(tokens=2000)
    until(lambda: lab.curve.figure.data and len(lab.curve.figure.data[0].y) > 2)
    assert lab.busy
    lab.stop()
    lab.wait(60)
    assert len(lab.snapshots["run"].history) < 2000 and not lab.busy


def test_a_method_is_swapped_while_it_runs(lab):
    lab.run(tokens=5000)
    until(lambda: lab.snapshots)
    lab.swap("streaming-llm:budget=8")
    until(lambda: lab.snapshots["run"].setup == "streaming-llm(budget=8)")
    assert lab.busy
    lab.stop()
    lab.wait(60)
    setups = lab.snapshots["run"].history["setup"].unique().tolist()
    assert setups == ["snapkv(budget=0.5)", "streaming-llm(budget=8)"]
    assert lab.setup.slots["cache"].name.value == "streaming-llm", "the controls show what was put in charge"
    assert lab.curve.figure.layout.shapes, "the curve marks where it changed"


def test_buttons_do_what_verbs_do(lab):
    press(lab, "Run")
    lab.wait(60)
    lab.setup.slots["cache"].name.value = "streaming-llm"
    press(lab, "Branch")
    press(lab, "Continue")
    lab.wait(60)
    assert {name: len(seen.history) for name, seen in lab.snapshots.items()} == {"run": 13, "branch 1": 13}
    assert lab.snapshots["branch 1"].setup == "streaming-llm(budget=0.2)"
    assert len(lab._texts.children) == 2
    lab.shown.value = "run"
    assert "snapkv" in lab.held.figure.layout.title.text
    lab.question.value = " And then?"
    press(lab, "Ask")
    lab.wait(60)
    assert "append" in lab.snapshots["run"].history["phase"].tolist()


def test_the_run_that_is_looked_at_stays_when_another_comes(lab):
    lab.run()
    lab.wait(60)
    lab.shown.value = "run"
    lab.branch("streaming-llm:budget=8")
    lab.wait(60)
    assert lab.shown.options == ("the last", "run", "branch 1") and lab.shown.value == "run"
    assert "snapkv" in lab.held.figure.layout.title.text


def test_what_is_wrong_is_one_sentence_in_the_widget(lab):
    press(lab, "Continue")
    lab.wait(60)
    assert lab.error == "There is no run yet; start one first."
    lab.prompt.value = ""
    press(lab, "Run")
    lab.wait(60)
    assert lab.error.startswith("The prompt is empty") and "The prompt is empty" in lab._sentence.value
    lab.run(PROMPT)
    lab.wait(60)
    assert lab.error is None and lab._sentence.value == ""
    with pytest.raises(wb.UserError, match="no method named 'nope'"):
        lab.swap("nope")


def test_text_of_a_run_is_text(lab):
    from dataclasses import replace

    from workbench.widgets.lab import _text_html

    lab.run(tokens=1)
    lab.wait(60)
    seen = lab.snapshots["run"]
    hostile = replace(seen, texts=(*seen.texts[:-1], "<script>x</script>\x1b[31m\u202e"))
    shown = _text_html("<b>", hostile)
    assert "<script>" not in shown and "<b>:" not in shown and "\x1b" not in shown and "\u202e" not in shown


def test_closing_it_ends_the_player(tiny):
    lab = wb.widgets.Lab(tiny, PROMPT)
    lab.run(tokens=5000)
    until(lambda: lab.snapshots)
    lab.close()
    until(lambda: lab.status == "closed")
    assert lab.curve.comm is None, "what was on the page is closed, too"
    until(lambda: not {"workbench lab"} & {thread.name for thread in threading.enumerate()})


def test_experts_are_shown_where_there_are_some():
    lab = wb.widgets.Lab(wb.load("tiny-moe"), PROMPT, tokens=2)
    lab.run()
    lab.wait(60)
    assert lab.experts.figure.data[0].z.shape == lab.snapshots["run"].experts.shape
    lab.close()
