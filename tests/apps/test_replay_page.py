"""The replay page: a prompt is recorded once, sliders redraw what was kept, and live runs are put beside it."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("streamlit", reason="needs the extra `dashboard`")
from streamlit.testing.v1 import AppTest

import workbench as wb
from workbench.methods.base import parse_method
from workbench_dashboard.launch import APP
from workbench_dashboard.replay_bench import BUDGETS, ReplayBench


def open_page() -> AppTest:
    return AppTest.from_file(str(APP), default_timeout=120).run().switch_page("views/3_replay.py").run()


def figure(page: AppTest, key: str) -> dict:
    """The figure that was drawn under a key."""
    (found,) = [each for each in page.get("bidi_component") if each.proto.id.endswith(f"-{key}")]
    return json.loads(json.loads(found.proto.json)["figure"])


def fine(page: AppTest) -> AppTest:
    assert not page.exception and not page.error
    return page


def test_a_prompt_is_recorded_and_sliders_redraw_it():
    page = fine(open_page())
    assert page.info
    page.number_input(key="replay.prompt.length").set_value(64)
    page.number_input(key="replay.new_tokens").set_value(4).run()
    fine(page.button(key="replay.record").click().run())
    assert any("64 + 4 tokens" in each.value for each in page.text)
    before = figure(page, "replay.map")
    fine(page.slider(key="replay.budget").set_value(0.9).run())
    after = figure(page, "replay.map")
    assert "snapkv" in after["layout"]["title"]["text"] and before["data"][0]["z"] != after["data"][0]["z"]
    fine(page.selectbox(key="replay.method").set_value("streaming-llm").run())
    fine(page.number_input(key="replay.streaming-llm.sinks").set_value(2).run())
    fine(page.selectbox(key="replay.layer").set_value(1).run())
    fine(page.slider(key="replay.step").set_value(0).run())
    fine(page.multiselect(key="replay.methods").set_value(["snapkv", "streaming-llm"]).run())
    names = {line["name"] for line in figure(page, "replay.curves")["data"]}
    assert {"snapkv", "streaming-llm"} <= names and any(name.startswith("best possible") for name in names)
    fine(page.button(key="replay.check").click().run())
    assert any("points run live" in each.value for each in page.text) and len(page.dataframe) == 1


def test_curves_of_a_further_recording_fill_in_as_those_of_the_first_did(monkeypatch):
    more = []

    def curves(bench: ReplayBench, names, seconds: float):
        methods, done = known(bench, names, 0.0)
        more.append(done)
        return methods, done

    known = ReplayBench.curves
    monkeypatch.setattr(ReplayBench, "curves", curves)
    page = open_page()
    page.session_state["replay.filling"] = False  # as the recording before left it
    page.session_state["replay.methods"] = ["knorm"]
    page.number_input(key="replay.prompt.length").set_value(64)
    page.number_input(key="replay.new_tokens").set_value(2).run()
    fine(page.button(key="replay.record").click().run())
    assert more == [False, False] and page.session_state["replay.filling"]


def test_a_saved_recording_is_opened_and_a_bad_path_is_one_sentence(tiny, tmp_path):
    wb.record(tiny, "The statement is executed. " * 4, new_tokens=2).save(tmp_path / "run.recording")
    page = open_page()
    page.selectbox(key="replay.source").set_value("open a recording").run()
    fine(page.text_input(key="replay.path").set_value(str(tmp_path / "run.recording")).run())
    assert any("+ 2 tokens" in each.value for each in page.text)
    for bad in (str(tmp_path), "<script>alert(1)</script>", "a" * 5000, "\x00"):
        page.text_input(key="replay.path").set_value(bad).run()
        assert len(page.error) == 1 and not page.exception and "<script>" not in page.error[0].value


def test_a_bench_knows_what_it_has_replayed(tiny):
    bench = ReplayBench(wb.record(tiny, "The statement is executed. " * 4, new_tokens=2))
    assert set(bench.offered) | set(bench.missing) == set(wb.METHODS) and "dense" in bench.missing
    some, done = bench.curves(["knorm", "h2o"], 0.0)
    assert not done and [method.label for method in some] == ["knorm(budget=0.1)"]
    every, done = bench.curves(["knorm", "h2o"], 60.0)
    assert done and len(every) == 2 * len(BUDGETS)
    assert bench.point(parse_method("h2o:budget=0.5")) is bench.replay(every).point("h2o", 0.5)
