"""The live page: a run is played, changed, branched and asked on; whatever a prompt holds is shown as text."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("streamlit", reason="needs the extra `dashboard`")
from streamlit.testing.v1 import AppTest

import workbench as wb
from workbench.live import line_of
from workbench_dashboard.forms import NONE
from workbench_dashboard.launch import APP
from workbench_dashboard.models import _load as held

HOSTILE = "<script>alert(1)</script> \x1b[31mred $x^2$ **bold** ![](http://example.org/x.png) [a](http://example.org) :smile:"


@pytest.fixture
def page():
    opened = AppTest.from_file(str(APP), default_timeout=120)
    opened.run()
    opened.number_input(key="live.tokens").set_value(6)
    opened.number_input(key="live.prompt.length").set_value(64)
    return opened.run()


def press(page: AppTest, key: str) -> AppTest:
    return page.button(key=key).click().run()


def played(page: AppTest) -> AppTest:
    """The page once nothing plays any more: its own fragment would draw it anew."""
    for _ in range(600):
        page.run()
        assert not page.exception
        if status(page) == "Idle.":
            return page
        time.sleep(0.05)
    raise AssertionError(status(page))


def status(page: AppTest) -> str:
    return page.text[0].value


def numbers(page: AppTest) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for metric in page.metric:
        found.setdefault(metric.label, []).append(metric.value)
    return found


def figures(page: AppTest) -> set[str]:
    return {element.proto.id.rpartition("-")[2] for element in page.get("bidi_component")}


def test_a_run_a_swap_a_branch_and_a_question(page):
    assert page.button(key="live.stop").disabled and page.button(key="live.swap").disabled
    played(press(page, "live.run"))
    assert not page.error and numbers(page)["Tokens"] == ["6"]
    assert numbers(page)["Agreement"] == ["100%"] and numbers(page)["KL (nats)"] != ["n/a"]
    assert {"live.kv_physical_bytes", "live.kl_to_dense", "live.Tokens held.run"} <= figures(page)
    assert not any("Expert" in key for key in figures(page))
    dense_bytes = numbers(page)["KV held"]

    page.selectbox(key="live.cache").set_value("streaming-llm").run()
    page.selectbox(key="live.streaming-llm.budget.unit").set_value("tokens").run()
    page.number_input(key="live.streaming-llm.budget.tokens").set_value(16).run()
    played(press(page, "live.swap"))
    played(press(page, "live.continue"))
    assert numbers(page)["Tokens"] == ["12"] and numbers(page)["KV held"] != dense_bytes
    assert "run: streaming-llm(budget=16)" in [text.value for text in page.text]

    page.selectbox(key="live.cache").set_value("dense").run()
    played(press(page, "live.branch"))
    page.text_input(key="live.question").set_value("And then?")
    played(press(page, "live.ask"))
    assert numbers(page)["Tokens"] == ["18", "18"]
    assert {"live.Tokens held.run", "live.Tokens held.branch 1"} <= figures(page)
    assert [box.options for box in page.selectbox if box.label == "Run to change"] == [["run", "branch 1"]]


def test_experts_are_shown_where_there_are_some(page):
    page.selectbox(key="model").set_value("tiny-moe").run()
    page.number_input(key="live.tokens").set_value(3)
    page.checkbox(key="live.follow").uncheck()
    played(press(page, "live.run"))
    assert "live.Expert load.run" in figures(page) and "live.kl_to_dense" not in figures(page)
    assert numbers(page)["KL (nats)"] == ["n/a"]


def test_the_line_shown_is_that_of_the_model_that_is_waited_for_whatever_the_form_says(page):
    with line_of(held("tiny-dense").model).turn("somebody else"):
        press(page, "live.run")
        page.selectbox(key="model").set_value("tiny-moe").run()
        assert "In line for tiny-dense: somebody else, visitor" in status(page)
    played(page)


def test_a_hostile_prompt_is_text(page):
    page.selectbox(key="live.prompt.kind").set_value("Own text").run()
    assert "There is no text yet" in page.error[0].value and page.button(key="live.run").disabled
    page.text_area(key="live.prompt.text").set_value(HOSTILE).run()
    assert page.code[0].value.endswith(HOSTILE.replace("\x1b", "␛"))
    played(press(page, "live.run"))
    assert not page.error and not page.markdown and numbers(page)["Tokens"] == ["6"]


def test_a_model_that_is_none_is_said_as_it_was_typed(page):
    page.selectbox(key="model").set_value("another …").run()
    page.text_input(key="model.typed").set_value("no/such <b>$x$</b>").run()
    assert r"\<b\>\$x\$\</b\>" in page.error[0].value and page.button(key="live.run").disabled


def test_a_model_too_large_is_refused_before_it_is_loaded(page, tmp_path):
    config = wb.load("tiny-dense").model.config.to_dict() | {"intermediate_size": 2**36}
    type(wb.load("tiny-dense").model.config)(**config).save_pretrained(tmp_path)
    page.selectbox(key="model").set_value("another …").run()
    page.text_input(key="model.typed").set_value(str(tmp_path)).run()
    assert "for its weights, and" in page.error[0].value


def test_a_link_selects_the_method():
    page = AppTest.from_file(str(APP), default_timeout=120)
    page.query_params["method"] = "h2o"
    assert page.run().selectbox(key="live.cache").value == "h2o"
    page.query_params["method"] = "<script>"
    assert AppTest.from_file(str(APP), default_timeout=120).run().selectbox(key="live.cache").value in {"dense", NONE}
