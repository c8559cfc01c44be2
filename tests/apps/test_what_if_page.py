"""The what-if page: a link brings its choices along, the cross-over is put in words, and a bad config is one sentence."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("streamlit", reason="needs the extra `dashboard`")
from streamlit.testing.v1 import AppTest

from workbench_dashboard.launch import APP

CONFIG = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 96}


def open_page(**query: str) -> AppTest:
    page = AppTest.from_file(str(APP), default_timeout=120).run().switch_page("views/5_what_if.py")
    page.query_params.update(query)
    return page.run()


def fine(page: AppTest) -> AppTest:
    assert not page.exception and not page.error
    return page


def said(page: AppTest) -> str:
    return "\n".join(each.value for each in page.text)


def test_a_link_brings_its_choices_along():
    page = fine(open_page(model="tiny-moe", hardware="a100-40", dtype="fp16", context="131072", batch="4", new="32"))
    assert page.selectbox(key="link.hardware").value == "a100-40" and page.number_input(key="link.batch").value == 4
    assert "Fits" in said(page) and "one NVIDIA A100 40GB" in said(page)
    assert "snapkv:budget=0.2 pays" in said(page) and "with 32 new tokens" in said(page)
    fine(page.number_input(key="link.batch").set_value(1000).run())
    assert "Does not fit" in said(page) and page.query_params["batch"] in ("1000", ["1000"])


def test_a_link_of_nonsense_is_a_page_of_defaults():
    page = fine(open_page(model="<b>", hardware="abacus", dtype="x", context="7", batch="-1", new="²"))
    assert page.selectbox(key="what_if.model").value == "tiny-dense" and page.selectbox(key="link.hardware").value == "h100-sxm"
    page = open_page(batch="9" * 5000)
    assert page.number_input(key="link.batch").value == 1_000_000 and "more than can be counted" in page.error[0].value


def test_a_config_is_enough_and_what_is_wrong_with_one_is_said():
    page = open_page(model="a config …")
    fine(page.text_area(key="what_if.config").set_value(json.dumps(CONFIG)).run())
    assert "Predicted" in said(page)
    for wrong in (
        "{",
        "[]",
        "{}",
        '{"model_type": "<b>x</b>"}',
        json.dumps(CONFIG | {"num_hidden_layers": 10**9}),
        "[" * 50_000,
    ):
        page.text_area(key="what_if.config").set_value(wrong).run()
        assert len(page.error) == 1 and not page.exception and "<b>" not in page.error[0].value


def test_a_dtype_that_a_sheet_lacks_is_said():
    page = open_page(hardware="m2-pro", dtype="fp8")
    assert len(page.error) == 1 and "no fp8 peak" in page.error[0].value and not page.exception
