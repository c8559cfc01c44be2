"""A real JupyterLab in a real browser runs a notebook, and a widget's slider moves its figure."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra `notebook`")
pytest.importorskip("jupyterlab", reason="needs the extra `notebook`")

ROOT = Path(__file__).parents[2]
KERNEL = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
EXPLORER = """
import workbench as wb
lm = wb.load("tiny-dense")
recording = wb.record(lm, "The statement is executed once for every item. " * 4, new_tokens=8)
explorer = wb.widgets.ReplayExplorer(recording, "snapkv", methods=["snapkv", "knorm"], budgets=[0.2, 0.8])
explorer
"""
LAB = """
lab = wb.widgets.Lab(lm, "The statement is executed once. " * 4, "h2o:budget=0.5", tokens=24)
lab
"""


@pytest.fixture(scope="module")
def lab(browser, serve, tmp_path_factory):
    """JupyterLab over a folder of its own, with settings of its own; returns the folder and the address."""
    home = tmp_path_factory.mktemp("jupyter")
    folder = home / "notebooks"
    folder.mkdir()
    settings = home / "config/labconfig/page_config.json"
    settings.parent.mkdir(parents=True)
    settings.write_text(json.dumps({"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}}))
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    places = {"JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data", "JUPYTER_RUNTIME_DIR": "run", "IPYTHONDIR": "ipython"}
    environment = {name: str(home / place) for name, place in places.items()} | {"PYTHONPATH": os.pathsep.join(paths)}
    options = ["--no-browser", "--allow-root", "--ip=127.0.0.1", "--port={port}", "--IdentityProvider.token="]
    command = [sys.executable, "-m", "jupyterlab", *options, "--ServerApp.disable_check_xsrf=True"]
    return folder, serve([*command, f"--ServerApp.root_dir={folder}"], "/api/status", env=os.environ | environment)


def opened(page, address: str, name: str):
    """The notebook in the page, its kernel ready."""
    page.goto(f"{address}/lab/workspaces/{Path(name).stem}/tree/{name}")  # one of its own, without what others left open
    page.locator(".jp-Notebook .jp-CodeCell").first.wait_for(timeout=60_000)
    page.locator(".jp-StatusBar-Widget", has_text="| Idle").wait_for(timeout=60_000)
    return page.locator(".jp-Notebook")


def run_all(page) -> None:
    """Runs all cells. JupyterLab drops them without a word while it says idle and is not yet connected, so: again."""
    for _ in range(20):
        page.locator(".jp-Notebook .jp-CodeCell").first.click()
        page.get_by_role("menuitem", name="Run", exact=True).click()
        page.get_by_role("menuitem", name="Run All Cells", exact=True).click()
        page.wait_for_timeout(1000)
        if page.locator(".jp-CodeCell .jp-InputPrompt", has_text=re.compile(r"[\d*]")).count():
            return
    pytest.fail("JupyterLab ran nothing.")


def test_the_first_notebook_runs(page, lab):
    folder, address = lab
    path = shutil.copy(ROOT / "notebooks/01_first_profile.ipynb", folder)
    sources = [cell.source for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]
    drawing = [source for source in sources if re.search(r"\bplots\.|\.pareto\(", source)]
    book = opened(page, address, "01_first_profile.ipynb")
    run_all(page)
    page.wait_for_function(
        "() => [...document.querySelectorAll('.jp-CodeCell .jp-InputPrompt')].every(each => /\\d/.test(each.textContent))",
        timeout=120_000,
    )
    assert len(drawing) >= 2
    page.wait_for_function(f"() => document.querySelectorAll('.js-plotly-plot .main-svg').length >= {len(drawing)}")
    assert book.locator(".js-plotly-plot").count() == len(drawing)
    assert book.locator(".jp-OutputArea-output table").count() >= 2
    assert not book.locator("[data-mime-type='application/vnd.jupyter.error']").count()
    assert page.errors == []


def test_a_slider_moves_the_figure(page, lab):
    folder, address = lab
    cells = [nbformat.v4.new_code_cell(source.strip()) for source in (EXPLORER, LAB)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), folder / "explore.ipynb")
    book = opened(page, address, "explore.ipynb")
    run_all(page)
    explorer, live = (book.locator(".jp-CodeCell").nth(number) for number in (0, 1))
    kept = explorer.locator(".js-plotly-plot").first
    kept.wait_for(state="attached", timeout=90_000)
    kept.scroll_into_view_if_needed()
    held = "gd => gd.calcdata[0][0].z.flatMap(row => [...row]).reduce((sum, share) => sum + share)"
    before = kept.evaluate(held)
    handle = explorer.locator(".noUi-handle").first
    handle.focus()
    for _ in range(5):
        handle.press("ArrowRight")
    page.wait_for_function("gd => gd.layout.title.text.includes('0.25')", arg=kept.element_handle(), timeout=30_000)
    assert kept.evaluate(held) > before, "a larger budget keeps more"

    live.get_by_role("button", name="Run", exact=True).click()
    curve = live.locator(".js-plotly-plot").first
    page.wait_for_function("gd => gd.calcdata?.[0]?.length > 20", arg=curve.element_handle(), timeout=60_000)
    assert live.locator("pre").inner_text().strip()
    assert page.errors == []
