"""The dashboard as its visitors meet it: the real server in a real browser, and what is drawn there."""

from __future__ import annotations

import re
import sys

import pytest

import workbench as wb
from workbench.visiting import Visitor

COMMAND = [sys.executable, "-c", "from workbench.cli import main; main()", "dashboard", "--port", "{port}"]
NOTHING = "<script>window.harmed = true</script> <img src=x onerror='window.harmed = true'> $x^2$ **bold** \x1b[31mred"


@pytest.fixture(scope="module")
def address(serve) -> str:
    return serve(COMMAND, "/_stcore/health")


@pytest.fixture
def visitor(page, address):
    visiting = Visitor(page, address)
    yield visiting
    assert page.errors == []
    assert not page.evaluate("window.harmed")


def ask(visitor: Visitor, query: str) -> None:
    visitor.page.get_by_label("One SELECT over the tables").fill(query)
    visitor.press("Run")
    visitor.rest()


def kept(figure: dict) -> float:
    return sum(map(sum, figure["traces"][0]["z"]))


def test_a_live_run_with_a_swap_in_the_middle(visitor):
    visitor.open()
    visitor.choose("Cache method", "snapkv")
    visitor.fill("Tokens to decode", 5000)
    visitor.press("Run")
    visitor.see("Running.")
    visitor.figure("KV cache")
    visitor.choose("Cache method", "streaming-llm")
    visitor.choose("Budget in", "tokens")
    visitor.fill("Budget", 32)
    visitor.press("Change the method")
    visitor.see("run: streaming-llm(budget=32)")
    figure = visitor.until("KV cache", lambda figure: figure["notes"])
    visitor.press("Stop")
    visitor.see("Idle.")
    assert any("streaming-llm" in note for note in figure["notes"])
    held = [value for trace in figure["traces"] for value in trace["y"] or [] if value is not None]
    assert min(held) < max(held) / 2  # the curve bends: SnapKV held a fifth of 512 tokens and what came, and now 32 are held
    for title in ("Tokens held", "ntropy", "KL"):
        assert any(title in each["title"] for each in visitor.figures()), title


def test_both_futures_of_a_branch_are_drawn(visitor):
    visitor.open()
    visitor.choose("Prompt", "Own text")
    visitor.fill("Text", NOTHING + " the quick brown fox" * 20)
    visitor.fill("Tokens to decode", 5)
    visitor.press("Run")
    visitor.see("Idle.")
    visitor.choose("Cache method", "streaming-llm")
    visitor.press("Branch")
    visitor.see("branch 1: streaming-llm")
    visitor.press("Continue")
    visitor.see("Idle.")
    visitor.rest()
    assert len(visitor.figure("Tokens held")["traces"]) and len(visitor.figure("KV cache")["traces"]) >= 2
    visitor.page.get_by_label("A further question").fill("<b>And then?</b>")
    visitor.press("Ask")
    visitor.rest()
    visitor.see("<b>And then?</b>")


def test_others_wait_in_line_and_a_closed_tab_frees_the_model(browser, address, visitor):
    other = browser.new_context()
    first = Visitor(other.new_page(), address)
    first.open()
    first.fill("Tokens to decode", 5000)
    first.press("Run")
    first.see("Running.")
    visitor.open()
    visitor.fill("Tokens to decode", 5)
    visitor.press("Run")
    visitor.see("1 before you")
    assert not visitor.figures()
    other.close()
    visitor.see("Idle.")
    assert visitor.figure("KV cache")["traces"]


def test_a_comparison_is_kept_under_its_link(visitor):
    visitor.open("compare")
    visitor.fill("Context", 128)
    visitor.fill("Samples", 1)
    visitor.fill("Budgets", "0.5")
    visitor.press("Compare")
    visitor.page.wait_for_url(re.compile(r"[?&]id="))
    visitor.see("snapkv(budget=0.5)")
    assert {"dense", "h2o", "snapkv", "streaming-llm"} <= {trace["name"] for trace in visitor.figure("score against")["traces"]}
    link = visitor.page.url
    visitor.page.goto("about:blank")
    visitor.page.goto(link)
    visitor.rest()
    visitor.see("snapkv(budget=0.5)")


def test_a_replay_follows_its_slider(visitor):
    visitor.open("replay")
    visitor.press("Record")
    before = kept(visitor.figure("Tokens read at step"))
    visitor.slide("Budget (share of the prompt)", -10)
    visitor.until("Tokens read at step", lambda figure: kept(figure) < 0.7 * before)
    visitor.until("Replay of", lambda figure: len(figure["traces"]) > 20)  # all methods, one after the other


def test_a_trace_is_opened(visitor, tmp_path):
    session = wb.Session(wb.load("tiny-dense"), wb.SnapKV(budget=0.3), out=tmp_path / NOTHING.replace("/", "|"))
    session.prefill(NOTHING + " the quick brown fox" * 10)
    session.generate(4)
    session.close()
    visitor.open("trace")
    visitor.fill("Folder", next(tmp_path.iterdir()))
    assert visitor.figure("KV cache")["traces"]
    visitor.page.get_by_text("SQL", exact=True).click()
    ask(visitor, "SELECT count(*) AS num_steps FROM steps")
    visitor.page.get_by_text("num_steps").first.wait_for(state="attached")  # tables are drawn on a canvas
    elsewhere = tmp_path / "written.csv"
    ask(visitor, f"COPY steps TO '{elsewhere}'")
    visitor.see("SELECT")
    assert not elsewhere.exists()


def test_a_broken_upload_is_one_sentence(visitor):
    visitor.open("trace")
    visitor.page.locator("input[type=file]").set_input_files(
        {"name": "run.zip", "mimeType": "application/zip", "buffer": b"PK\x03\x04 no more than this"}
    )
    alert = visitor.page.get_by_role("alert")
    alert.wait_for()
    assert "zip" in alert.inner_text() and "Traceback" not in visitor.page.inner_text("body")


def test_a_what_if(visitor):
    visitor.open("what_if")
    first = visitor.figure("Predicted time by component")
    visitor.slide("Context (tokens)", 3)
    visitor.until("Predicted time by component", lambda figure: figure != first)
    assert len(visitor.figure("Roofline")["traces"]) > 3 and len(visitor.figure("beside dense")["traces"]) > 2


def test_the_routing_of_a_run_is_looked_at(visitor):
    visitor.open("routing")
    visitor.choose("Prompt", "Own text")
    visitor.fill("Text", NOTHING + " the quick brown fox")
    visitor.press("Run")
    assert len(visitor.figure("Expert load")["traces"][0]["z"]) == 4
    visitor.page.get_by_text("Lanes", exact=True).click()
    lanes = visitor.figure("Experts by token")["traces"][0]
    assert len(lanes["z"]) == 4 and len(lanes["x"]) == 48
    visitor.slide("Tokens", 3)
    visitor.until("Experts by token", lambda figure: len(figure["traces"][0]["x"]) == 45)
    visitor.page.get_by_text("Expert cache", exact=True).click()
    assert len(visitor.figure("Experts found in a cache")["traces"]) == 3
