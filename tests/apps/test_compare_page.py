"""The compare page: a grid runs and can be called off, results open again by their link, and a bad link is one sentence."""

from __future__ import annotations

import time

import pytest

pytest.importorskip("streamlit", reason="needs the extra `dashboard`")
from streamlit.testing.v1 import AppTest

import workbench as wb
from workbench_dashboard import kept
from workbench_dashboard.comparer import Comparer, Job
from workbench_dashboard.launch import APP


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))


def open_page(**query: str) -> AppTest:
    page = AppTest.from_file(str(APP), default_timeout=120).run().switch_page("views/2_compare.py")
    page.query_params.update(query)
    return page.run()


def test_a_grid_is_run_kept_and_opened_by_its_link():
    page = open_page()
    assert page.info and not page.error
    page.number_input(key="compare.recall.context").set_value(128)
    page.number_input(key="compare.recall.samples").set_value(1)
    page.multiselect(key="compare.methods").set_value(["snapkv"])
    page.text_input(key="compare.budgets").set_value("0.5 32")
    page.text_area(key="compare.own").set_value("h2o:budget=0.3,recent=0.25").run()
    page.button(key="compare.run").click().run()
    for _ in range(400):
        if "id" in page.query_params:
            break
        time.sleep(0.05)
        page.run()
        assert not page.exception and not page.error
    (id,) = kept.ids()
    assert page.query_params["id"] in (id, [id]) and id.startswith("recall-tiny-dense-")
    labels = [row.setup for row in kept.opened(id).rows]
    assert labels[:3] == ["dense", "snapkv(budget=0.5)", "snapkv(budget=32)"] and labels[3].startswith("h2o(budget=0.3")

    again = open_page(id=id)
    assert not again.error and not again.exception and "fired on" in again.get("html")[0].proto.body
    assert again.dataframe[0].value.shape == (4, 4)
    assert "snapkv(budget=0.5)" in again.selectbox(key="compare.kept").options


@pytest.mark.parametrize("id", ["../../etc", "a/b", "nothing-here", "<script>", ".."])
def test_a_link_to_nothing_is_one_sentence(id):
    page = open_page(id=id)
    assert len(page.error) == 1 and page.error[0].value.startswith("There is no comparison") and not page.exception


def test_what_is_wrong_in_a_form_is_said_and_nothing_can_be_run():
    page = open_page()
    page.text_input(key="compare.budgets").set_value("0.5 <b>").run()
    assert r"\<b\>" in page.error[0].value and page.button(key="compare.run").disabled
    page.text_input(key="compare.budgets").set_value("7.5").run()
    assert "Knob 'budget'" in page.error[0].value
    page.multiselect(key="compare.methods").set_value([])
    page.text_area(key="compare.own").set_value("nonsense:budget=1").run()
    assert "There is no method named" in page.error[0].value


def test_a_comparison_called_off_goes_on_from_what_was_finished():
    lm, workload = wb.load("tiny-dense"), wb.workloads.recall(context=128, samples=2)
    setups = [wb.Setup(wb.SnapKV(budget=budget)) for budget in (0.5, 0.4, 0.3, 0.2)]
    comparer = Comparer("somebody")
    comparer.start(Job(lm, workload, setups))
    job = comparer.job
    while not job.done.get("snapkv(budget=0.5)"):
        time.sleep(0.005)
    comparer.cancel()
    assert job.finished.wait(60) and job.status == "called off" and job.id is None and job.progress < 1
    assert (kept.cells_folder() / "cells").exists() and not kept.ids()
    comparer.start(Job(lm, workload, setups))
    assert comparer.job.finished.wait(120) and comparer.job.error is None and comparer.job.progress == 1
    assert kept.ids() == [comparer.job.id]


def test_a_method_that_does_not_go_is_said():
    comparer = Comparer("somebody")
    comparer.start(Job(wb.load("tiny-dense"), wb.workloads.recall(context=10_000, samples=1), [wb.Setup(wb.SnapKV())]))
    assert comparer.job.finished.wait(60) and comparer.job.status == "stopped" and "do not fit" in comparer.job.error
