"""A headless browser, and servers for it to look at. Where there is none these tests skip with the reason."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from workbench.errors import UserError
from workbench.pictures import chromium

FLAGS = ("--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
"""Chromium as root in a container, with little shared memory and no graphics."""


@pytest.fixture(scope="session")
def browser() -> Iterator:
    """The machine's Chromium under Playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install 'workbench-llm[dev]'")
    try:
        found = chromium()
    except UserError:
        pytest.skip("needs Chromium: apt-get install -y chromium")
    with playwright.sync_playwright() as running:
        opened = running.chromium.launch(executable_path=found, args=list(FLAGS))
        yield opened
        opened.close()


@pytest.fixture
def page(browser) -> Iterator:
    """A page of 1,280 x 1,000 points whose `errors` are what the console and the scripts complained about, to be asserted."""
    context = browser.new_context(viewport={"width": 1280, "height": 1000})
    opened = context.new_page()
    opened.errors = []
    opened.on("console", lambda message: _is_ours(message) and opened.errors.append(message.text))
    opened.on("pageerror", lambda error: opened.errors.append(str(error)))
    yield opened
    context.close()


def _is_ours(message) -> bool:
    """Whether it is an error, and not one of the two that Streamlit makes itself where an address has a page in it."""
    return message.type == "error" and not re.search(r"/\w+/_stcore/(health|host-config)$", message.location["url"])


@pytest.fixture(scope="module")
def serve(tmp_path_factory) -> Iterator:
    """`serve(command, path)` starts a server and returns its address once `path` answers; all end with the module.

    `{port}` in an argument stands for a free port. What a server says is shown if it does not come up.
    """
    started = []

    def start(command: list[str], path: str = "/", wait_s: float = 60.0, **options) -> str:
        port = _free_port()
        log = tmp_path_factory.mktemp("server") / "said.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [each.format(port=port) for each in command],
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                **options,
            )
        started.append(process)
        address = f"http://127.0.0.1:{port}"
        _wait_until_up(f"{address}{path}", process, log, wait_s)
        return address

    yield start
    for process in started:
        _end(process)


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def _wait_until_up(url: str, process: subprocess.Popen, log: Path, wait_s: float) -> None:
    give_up = time.monotonic() + wait_s
    while time.monotonic() < give_up and process.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
        else:
            return
    pytest.fail(f"{url} did not answer within {wait_s:g} s:\n{log.read_text(errors='replace')[-2000:]}")


def _end(process: subprocess.Popen) -> None:
    """Ends a server with everything it started."""
    for how in (signal.SIGTERM, signal.SIGKILL):  # the second for kernels that outlived their server
        try:
            os.killpg(process.pid, how)
            process.wait(10)
        except ProcessLookupError:
            return
        except subprocess.TimeoutExpired:
            continue
