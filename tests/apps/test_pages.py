"""Every page opens through Streamlit's own test driver, and what pages share does what it says."""

from __future__ import annotations

import importlib.util
import socket
import sys

import pytest

pytest.importorskip("streamlit", reason="needs the extra `dashboard`")
from streamlit.testing.v1 import AppTest

import workbench as wb
from workbench import cli
from workbench_dashboard.launch import APP
from workbench_dashboard.plain import as_markdown, visible

VIEWS = sorted((APP.parent / "views").glob("*.py"))


@pytest.fixture(scope="module")
def app() -> AppTest:
    return AppTest.from_file(str(APP), default_timeout=120).run()


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.stem)
def test_a_page_opens_without_an_error(app, view):
    page = app.switch_page(f"views/{view.name}").run()
    assert not page.exception and not page.error and page.title


def test_every_method_is_in_the_catalogue(app):
    page = app.switch_page("views/6_methods.py").run()
    assert [box.label.partition(":")[0].rstrip("\\") for box in page.expander] == list(wb.METHODS)


def test_text_is_shown_as_it_is_written():
    assert as_markdown("<b>*a* `b`\n[c](d) $e$ ![f](g)") == r"\<b\>\*a\* \`b\` \[c\](d) \$e\$ \!\[f\](g)"
    assert as_markdown("# a") == r"\# a" and as_markdown("1. a") == r"1\. a" and as_markdown("- a") == r"\- a"
    assert as_markdown("2024. a") == r"2024\. a" and as_markdown("12) a") == r"12\) a"
    assert "://" not in as_markdown("http://a").replace("\\", "") and "www." not in as_markdown("www.a")
    assert as_markdown(":smile:") != r"\:smile\:" and as_markdown("h2o:budget=0.2") == r"h2o\:budget=0.2"
    assert visible("\x1b[31mred\x00\n") == "␛[31mred␀\n"


def run_command(monkeypatch, capsys, *arguments: str) -> str:
    monkeypatch.setattr(sys, "argv", ["workbench", "dashboard", *arguments])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_a_port_that_is_taken_is_said(monkeypatch, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        said = run_command(monkeypatch, capsys, "--port", str(taken.getsockname()[1]))
    assert said.startswith("Error: Cannot listen on 127.0.0.1:") and "--port N" in said


@pytest.mark.parametrize("arguments", [("--port", "70000"), ("--host", "no such host")])
def test_an_address_that_is_none_is_said(monkeypatch, capsys, arguments):
    assert run_command(monkeypatch, capsys, *arguments).startswith("Error: Cannot listen on")


def test_without_streamlit_the_extra_is_named(monkeypatch, capsys):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "streamlit" else find(name, *rest))
    assert "workbench-llm[dashboard]" in run_command(monkeypatch, capsys)
