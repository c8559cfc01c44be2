"""The trace page: a folder or a zip is opened, every view draws, SQL is read-only, and a hostile trace stays text."""

from __future__ import annotations

import json

import pyarrow as pa
import pytest

pytest.importorskip("streamlit", reason="needs the extra `dashboard`")
from streamlit.testing.v1 import AppTest

import workbench as wb
from workbench.trace.archive import read_zip, zip_of
from workbench.trace.schema import TABLES
from workbench_dashboard.launch import APP
from workbench_dashboard.trace_views import VIEWS, perfetto

HTML = "<img src=x onerror=alert(1)>\x1b[31m"


@pytest.fixture(scope="module")
def trace(tiny) -> wb.Trace:
    session = wb.Session(tiny, wb.H2O(budget=8), importance="window")
    session.prefill("The statement is executed. " * 3)
    session.generate(3, stop_at_end=False)
    tokens = session.trace.arrow("tokens")
    place = tokens.schema.get_field_index("text")
    tables = {name: session.trace.arrow(name) for name in TABLES}
    tables["tokens"] = tokens.set_column(place, tokens.schema.field(place), pa.array([HTML] * len(tokens)))
    return wb.Trace({**session.trace.meta, "setup": HTML, "notes": [HTML]}, tables)


def open_page() -> AppTest:
    return AppTest.from_file(str(APP), default_timeout=120).run().switch_page("views/4_trace.py").run()


def fine(page: AppTest) -> AppTest:
    assert not page.exception and not page.error
    return page


def test_a_folder_is_opened_and_every_view_draws(trace, tmp_path):
    page = fine(open_page())
    assert page.info
    fine(page.text_input(key="trace.path").set_value(str(trace.save(tmp_path / "run.trace"))).run())
    assert page.dataframe[0].value["phase"].tolist() == ["prefill", "decode"]
    assert any("<img" in each.value for each in page.text) and not any("\x1b" in each.value for each in page.text)
    for view in VIEWS:
        fine(page.button_group(key="trace.view").set_value(view).run())
    page.text_area(key="trace.sql").set_value("select layer, count(*) as n from evictions group by layer order by layer")
    fine(page.button(key="trace.ask").click().run())
    assert page.dataframe[1].value["n"].sum() == trace.arrow("evictions").num_rows
    for wrong in ("copy steps to 'x.csv'", "select * from read_csv('/etc/passwd')", "select 1; select 2", "attach 'x'"):
        page.text_area(key="trace.sql").set_value(wrong)
        page.button(key="trace.ask").click().run()
        assert len(page.error) == 1 and page.error[0].value.startswith("The query failed") and not page.exception
    page.button_group(key="trace.view").set_value("Tables").run()
    fine(page.selectbox(key="trace.table").set_value("tokens").run())
    assert set(page.dataframe[1].value["text"]) == {"<img src=x onerror=alert(1)>␛[31m"}


@pytest.mark.parametrize("path", ["/nowhere", "<b>x</b>", "a" * 5000, "\x00", "/etc/passwd"])
def test_a_path_that_holds_no_trace_is_one_sentence(path):
    page = open_page()
    page.text_input(key="trace.path").set_value(path).run()
    assert len(page.error) == 1 and not page.exception and "<b>" not in page.error[0].value


def test_a_zip_is_opened_and_another_file_is_one_sentence(trace):
    page = open_page()
    fine(page.file_uploader(key="trace.zip").set_value(("run.zip", zip_of(trace), "application/zip")).run())
    assert page.dataframe[0].value["phase"].tolist() == ["prefill", "decode"]
    page = open_page()
    page.file_uploader(key="trace.zip").set_value(("run.zip", b"PK no zip", "application/zip")).run()
    assert len(page.error) == 1 and "no zip" in page.error[0].value and not page.exception


def test_downloads_hold_the_trace(trace):
    assert json.loads(perfetto(trace))["otherData"]["setup"] == HTML
    assert read_zip(zip_of(trace)).arrow("steps").equals(trace.arrow("steps"))
