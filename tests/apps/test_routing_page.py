"""The routing page: a prompt is run or a trace opened, every view draws, and what has no experts is one sentence."""

from __future__ import annotations

import pyarrow as pa
import pytest

pytest.importorskip("streamlit", reason="needs the extra `dashboard`")
from streamlit.testing.v1 import AppTest

import workbench as wb
from workbench.methods.base import SLOTS
from workbench.trace.archive import zip_of
from workbench.trace.schema import TABLES
from workbench_dashboard.launch import APP

HTML = "<img src=x onerror=alert(1)>\x1b[31m"
VIEWS = ("Load", "Lanes", "Chosen together", "Tokens in flight", "Expert cache", "Confidence")


def open_page() -> AppTest:
    return AppTest.from_file(str(APP), default_timeout=120).run().switch_page("views/7_routing.py").run()


def fine(page: AppTest) -> AppTest:
    assert not page.exception and not page.error, [each.value for each in page.error]
    return page


def opened(trace: wb.Trace) -> AppTest:
    page = open_page()
    page.selectbox(key="routing.source").set_value("open a trace").run()
    return page.file_uploader(key="routing.zip").set_value(("run.zip", zip_of(trace), "application/zip")).run()


@pytest.fixture(scope="module")
def trace() -> wb.Trace:
    """Somebody's, in a batch of two."""
    session = wb.Session(wb.load("tiny-moe"), routing="logits")
    session.prefill(["The statement is executed. " * 3, "A name"])
    session.generate(3, stop_at_end=False)
    tokens = session.trace.arrow("tokens")
    place = tokens.schema.get_field_index("text")
    tables = {name: session.trace.arrow(name) for name in TABLES}
    tables["tokens"] = tokens.set_column(place, tokens.schema.field(place), pa.array([HTML] * len(tokens)))
    return wb.Trace({**session.trace.meta, "setup": HTML}, tables)


@pytest.fixture(scope="module")
def ran() -> AppTest:
    page = fine(open_page())
    assert page.selectbox(key="model").value == "tiny-moe" and page.info
    page.selectbox(key="routing.setup.cache").set_value("knorm")
    page.selectbox(key="routing.setup.routing").set_value("top-k")
    page.selectbox(key="routing.prompt.kind").set_value("Own text").run()
    page.text_area(key="routing.prompt.text").set_value("The statement is executed once.").run()
    page.number_input(key="routing.new_tokens").set_value(3)
    return fine(page.button(key="routing.run").click().run())


def test_a_prompt_is_run_and_its_numbers_are_those_of_a_session(ran):
    session = wb.Session(wb.load("tiny-moe"), wb.Setup(wb.KNorm(), wb.TopK(k=1)))
    session.prefill("The statement is executed once.")
    session.generate(3, stop_at_end=False)
    layers = ran.dataframe[0].value
    assert any(session.trace.setup in each.value for each in ran.text)
    assert layers["read_bytes"].tolist() == session.trace.routing()["read_bytes"].tolist()
    shown = {metric.label: metric.value for metric in ran.metric}
    assert shown["Bytes a decode step"] == "864 KiB" and shown["of all experts"] == "12%"  # 4 layers x 221,184 bytes


def test_the_phase_and_the_slots_are_chosen(ran):
    fine(ran.selectbox(key="routing.phase").set_value("decode").run())
    assert ran.dataframe[0].value["steps"].tolist() == [3, 3, 3, 3]
    fine(ran.button_group(key="routing.view").set_value("Expert cache").run())
    fine(ran.slider(key="routing.slots").set_value(3).run())
    assert set(ran.dataframe[0].value["slots"]) == {3}


def test_each_slot_that_has_methods_has_a_form(ran):
    filled = [slot for slot in SLOTS if any(cls.slot == slot for cls in wb.METHODS.values())]
    for slot in filled:
        names = [name for name, cls in wb.METHODS.items() if cls.slot == slot]
        assert set(names) <= set(ran.selectbox(key=f"routing.setup.{slot}").options)


def test_a_model_without_experts_is_one_sentence():
    page = open_page()
    page.selectbox(key="model").set_value("tiny-dense").run()
    assert [each.value for each in page.error] == ["tiny-dense has no experts; choose a mixture of experts such as tiny-moe."]
    assert not page.exception


def test_every_view_of_somebodys_trace_draws_and_its_texts_stay_texts(trace):
    page = fine(opened(trace))
    assert any("<img" in each.value for each in page.text) and not any("\x1b" in each.value for each in page.text)
    for view in VIEWS:
        fine(page.button_group(key="routing.view").set_value(view).run())


def test_a_trace_without_choices_shows_what_it_has_and_says_what_it_lacks(trace):
    page = opened(
        wb.Trace(trace.meta, {name: trace.arrow(name) for name in TABLES} | {"choices": TABLES["choices"].empty_table()})
    )
    fine(page)
    assert {metric.label: metric.value for metric in page.metric}["Reused next token"] == "n/a"
    fine(page.button_group(key="routing.view").set_value("Tokens in flight").run())
    page.button_group(key="routing.view").set_value("Lanes").run()
    assert not page.exception and len(page.error) == 1 and "no choices by token" in page.error[0].value


def test_a_trace_without_experts_is_one_sentence(tiny):
    session = wb.Session(tiny)
    session.prefill([3, 4])
    page = opened(session.trace)
    assert not page.exception and len(page.error) == 1 and "No expert was called" in page.error[0].value
