"""How values show in a notebook: as text and as HTML that is only text, without heavy work."""

from __future__ import annotations

import dataclasses

import pytest

import workbench as wb
from workbench.trace.trace import Trace

PROMPT = "The statement is executed once for every item. " * 3
HOSTILE = "<script>alert(1)</script>"


@pytest.fixture(scope="module")
def values():
    lm = wb.load("tiny-dense")
    recording = wb.record(lm, PROMPT, new_tokens=4)
    comparison = wb.compare(lm, wb.workloads.text(context=32, samples=1, continuation=4), [wb.SnapKV(budget=0.5)])
    return {"LM": lm, "Recording": recording, "Replay": wb.replay(recording, ["snapkv"], [0.5]), "Comparison": comparison}


@pytest.mark.parametrize("name", ["LM", "Trace", "Recording", "Replay", "Comparison"])
def test_a_value_shows_as_text_and_as_html(values, name):
    value = {**values, "Trace": values["Recording"].trace}[name]
    bundle = value._repr_mimebundle_()
    assert bundle["text/plain"] == repr(value) and repr(value).startswith(name)
    assert bundle["text/html"].startswith("<p><b>") and bundle["text/html"] == value._repr_html_()


def test_names_that_hold_html_show_as_text(values):
    lm = dataclasses.replace(values["LM"], name=HOSTILE)
    trace = values["Recording"].trace
    steps = trace.arrow("steps")
    column = steps.column_names.index("phase")
    tables = {name: trace.arrow(name) for name in trace._tables}
    tables["steps"] = steps.set_column(column, "phase", [[HOSTILE] * steps.num_rows])
    meta = {**trace.meta, "setup": HOSTILE, "notes": [HOSTILE], "anatomy": {**trace.meta["anatomy"], "class_name": HOSTILE}}
    hostile = Trace(meta, tables)
    about = {**values["Comparison"].about, "model": HOSTILE}
    comparison = dataclasses.replace(values["Comparison"], about=about)
    replay = dataclasses.replace(values["Replay"], about={**values["Replay"].about, "model": HOSTILE})
    for value in (lm, hostile, comparison, replay, dataclasses.replace(values["Recording"], trace=hostile)):
        shown = value._repr_mimebundle_()["text/html"]
        assert "<script>" not in shown and "&lt;script&gt;" in shown


def test_a_trace_shows_its_facts_without_counting_costs(values, monkeypatch):
    trace = values["Recording"].trace
    assert "<td>decode</td>" in trace._repr_html_()

    def counted(*_, **__):
        raise AssertionError("costs are worked out when they are asked for")

    monkeypatch.setattr(Trace, "flops", counted)
    monkeypatch.setattr(Trace, "bytes", counted)
    assert "<td>prefill</td>" in trace._repr_html_()
