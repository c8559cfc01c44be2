"""What a visitor of the dashboard waits for, in a real browser; and pictures of every page.

usage: python benchmarks/ui.py [--pictures FOLDER] [--minutes 0] [--moves 20]

Starts `workbench dashboard` and drives it in a headless Chromium with tiny-dense, once the model is loaded:

- first paint: from the address to the page's controls, and until all it draws at once is there, each page in a new tab;
- slider: from the key to the changed figure on the screen of the replay page (512 + 32 tokens), SnapKV;
- long trace: from Enter to the figure, for a trace of a million rows;
- with `--minutes`, what the server's memory grows by while one live run follows another, after the first three.
"""

from __future__ import annotations

import argparse
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from long_trace import long_trace
from playwright.sync_api import Page, sync_playwright

import workbench as wb
from workbench.pictures import chromium
from workbench.visiting import Visitor

PAGES = ("", "compare", "replay", "trace", "what_if", "methods", "routing")
WIDTH, HEIGHT = 1280, 1400
WARM_UP_RUNS = 3


@contextmanager
def dashboard() -> Iterator[tuple[str, int]]:
    """A server: its address and its process."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    command = [sys.executable, "-c", "from workbench.cli import main; main()", "dashboard", "--port", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT)
    address = f"http://127.0.0.1:{port}"
    try:
        while True:
            try:
                urllib.request.urlopen(f"{address}/_stcore/health", timeout=5).close()
                break
            except (urllib.error.URLError, OSError):
                time.sleep(0.1)
        yield address, server.pid
    finally:
        server.terminate()
        server.wait(20)


def first_paint_s(visitor: Visitor, path: str) -> tuple[float, float]:
    """Seconds until a page's first controls are there, and until it rests."""
    began = time.perf_counter()
    visitor.page.goto(f"{visitor.address}/{path}")
    visitor.page.wait_for_selector('[data-testid="stWidgetLabel"], [data-testid="stExpander"]')
    painted = time.perf_counter() - began
    visitor.rest()
    return painted, time.perf_counter() - began


def slider_s(visitor: Visitor, moves: int) -> list[float]:
    """Seconds of each move of the budget's slider until the kept map has changed."""
    visitor.open("replay")
    visitor.press("Record")
    visitor.figure("Tokens read at step")
    visitor.until("Replay of", lambda figure: len(figure["traces"]) > 20)
    visitor.page.wait_for_timeout(8000)  # until the curves of all methods are there
    handle = visitor.page.get_by_role("slider", name="Budget (share of the prompt)").first
    seconds = []
    for move in range(moves):
        before = visitor.page.evaluate("document.querySelector('.js-plotly-plot').layout.title.text")
        began = time.perf_counter()
        handle.press("ArrowRight" if move % 2 else "ArrowLeft")
        visitor.page.wait_for_function(
            "before => document.querySelector('.js-plotly-plot').layout.title.text !== before", arg=before, polling="raf"
        )
        seconds.append(time.perf_counter() - began)
        visitor.page.wait_for_timeout(300)
    return seconds


def long_trace_s(visitor: Visitor, folder: Path) -> tuple[float, float]:
    """Seconds until a long trace is open and its first figure drawn, and until its map of held tokens is."""
    visitor.open("trace")
    field = visitor.page.get_by_label("Folder", exact=True)
    field.fill(str(folder))
    began = time.perf_counter()
    field.press("Enter")
    visitor.figure("KV cache")
    opened = time.perf_counter() - began
    began = time.perf_counter()
    visitor.page.get_by_text("Held tokens", exact=True).click()
    visitor.figure("Tokens held at the end")
    return opened, time.perf_counter() - began


def growth_bytes(visitor: Visitor, process: int, minutes: float) -> tuple[int, int]:
    """What the server's resident memory grows by over so many minutes of live runs, and how many they were."""
    visitor.open()
    visitor.fill("Tokens to decode", 200)
    runs, first, began = 0, 0, time.monotonic()
    while time.monotonic() - began < 60 * minutes or runs <= WARM_UP_RUNS:
        visitor.press("Run")
        visitor.page.wait_for_timeout(1000)
        visitor.see("Idle.")
        runs += 1
        if runs == WARM_UP_RUNS:
            first, began = resident_bytes(process), time.monotonic()
    return resident_bytes(process) - first, runs - WARM_UP_RUNS


def resident_bytes(process: int) -> int:
    """Memory of a process that lies in RAM."""
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{process}/status").read_text())
    return 1024 * int(found[1]) if found else 0


def pictures(page: Page, visitor: Visitor, folder: Path) -> None:
    """Every page in use, as PNG."""

    def take(name: str) -> None:
        page.mouse.move(0, HEIGHT - 1)
        page.wait_for_timeout(1500)
        page.screenshot(path=folder / f"dashboard-{name}.png")
        print(folder / f"dashboard-{name}.png")

    visitor.open()
    visitor.choose("Cache method", "snapkv")
    visitor.fill("Tokens to decode", 2000)
    visitor.press("Run")
    visitor.until("KV cache", lambda figure: len(figure["traces"][0]["x"]) > 150)
    visitor.choose("Cache method", "streaming-llm")
    visitor.press("Change the method")
    visitor.until(
        "KV cache", lambda figure: any(len(each["x"]) > 80 for each in figure["traces"] if each["name"] == "streaming-llm")
    )
    take("live")
    visitor.press("Stop")
    visitor.open("compare")
    visitor.fill("Samples", 2)
    visitor.fill("Budgets", "0.75 0.5 0.35 0.2")
    visitor.press("Compare")
    visitor.figure("score against")
    take("compare")
    visitor.open("replay")
    visitor.press("Record")
    visitor.until("Replay of", lambda figure: len(figure["traces"]) > 20)
    page.wait_for_timeout(8000)
    take("replay")
    with tempfile.TemporaryDirectory() as made:
        session = wb.Session(wb.load("tiny-dense"), wb.H2O(budget=0.3), importance="window", out=Path(made) / "run.trace")
        session.prefill("The statement is executed once for every item of the list. " * 20)
        session.generate(64, stop_at_end=False)
        session.close()
        visitor.open("trace")
        visitor.fill("Folder", Path(made) / "run.trace")
        page.get_by_text("Held tokens", exact=True).click()
        visitor.figure("Tokens held at the end")
        take("trace")
    visitor.open("what_if")
    visitor.figure("beside dense")
    take("what-if")
    visitor.open("routing")
    visitor.press("Run")
    visitor.figure("Expert load")
    page.get_by_text("Lanes", exact=True).click()
    visitor.figure("Experts by token")
    take("routing")
    visitor.open("methods")
    page.get_by_text("cake: ").click()
    take("methods")


def main() -> None:
    """Measures, prints a table, and takes the pictures if asked to."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=Path)
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--moves", type=int, default=20)
    options = parser.parse_args()
    with dashboard() as (address, process), sync_playwright() as playwright, tempfile.TemporaryDirectory() as made:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = playwright.chromium.launch(executable_path=chromium(), args=flags)

        def tab() -> Visitor:
            return Visitor(browser.new_context(viewport={"width": WIDTH, "height": HEIGHT}).new_page(), address, wait_s=120)

        tab().open()  # loads the model
        if options.pictures is not None:
            options.pictures.mkdir(parents=True, exist_ok=True)
            visitor = tab()
            pictures(visitor.page, visitor, options.pictures)
            return
        print("| what | seconds |\n| --- | --- |")
        for path in PAGES:
            painted, rests = first_paint_s(tab(), path)
            print(f"| first paint of {path or 'live'} (all of it) | {painted:.2f} ({rests:.2f}) |", flush=True)
        moved = slider_s(tab(), options.moves)
        print(f"| slider to screen, median of {len(moved)} (slowest) | {median(moved):.3f} ({max(moved):.3f}) |", flush=True)
        opened, mapped = long_trace_s(tab(), long_trace(8000).save(Path(made) / "long.trace"))
        print(
            f"| a trace of a million rows, opened and drawn | {opened:.2f} |\n| its map of held tokens | {mapped:.2f} |",
            flush=True,
        )
        if options.minutes:
            grown, runs = growth_bytes(tab(), process, options.minutes)
            print(f"\nThe server grew by {grown / 2**20:.1f} MiB over {options.minutes:g} minutes, {runs} live runs.")


if __name__ == "__main__":
    main()
