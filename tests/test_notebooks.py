"""Every notebook runs from top to bottom, is stored without outputs, and is shown in docs/notebooks as it is."""

from __future__ import annotations

import gc
import os
import re
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient import NotebookClient

import workbench as wb
from workbench.folders import cache_directory
from workbench.models.catalogue import catalogue

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
USERS_CACHE = cache_directory()
"""As it is before the tests set up one of their own."""


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One kernel for all of them, since starting it and importing torch takes longer than most; names are forgotten between.

    It has a cache of its own, in which converted models of the user's can be read.
    """
    cache = tmp_path_factory.mktemp("cache")
    for entry in catalogue():
        if (USERS_CACHE / entry["name"]).is_dir():
            (cache / entry["name"]).symlink_to(USERS_CACHE / entry["name"])
    path = os.pathsep.join([str(Path(wb.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "WORKBENCH_CACHE": str(cache), "PYTHONPATH": path}
    manager = AsyncKernelManager(kernel_name="python3")
    run_sync(manager.start_kernel)(env=environment)
    yield manager, cache
    run_sync(manager.shutdown_kernel)(now=True)


def read(path: Path) -> tuple[nbformat.NotebookNode, list[nbformat.NotebookNode]]:
    """A notebook and its code cells."""
    notebook = nbformat.read(path, as_version=4)
    return notebook, [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_cells_are_short_and_stored_without_outputs(path):
    notebook, code = read(path)
    assert notebook.metadata.kernelspec.name == "python3"
    assert not any(cell.outputs or cell.execution_count for cell in code), "strip the outputs before committing"
    assert all(len(cell.source.splitlines()) <= 12 for cell in code), "cells are short"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # about sockets to a kernel that goes on
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, kernel):
    manager, cache = kernel
    notebook, code = read(path)
    loaded = set(re.findall(r'wb\.load\("(.+?)"\)', "\n".join(cell.source for cell in code)))
    for entry in catalogue():
        if entry["name"] in loaded and not (entry["ready"] or (cache / entry["name"]).exists()):
            pytest.skip(f"{entry['name']} is not here: {entry['how']}")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(f"%reset -f\n%cd -q {tmp_path}"))
    NotebookClient(notebook, timeout=400, km=manager).execute()
    gc.collect()  # nbclient leaves those sockets to the garbage collector: here, and not in some other test
    shown = [output for cell in code for output in cell.outputs if output.output_type in ("execute_result", "display_data")]
    kinds = {kind for output in shown for kind in output.data}
    assert {"text/html", "application/vnd.plotly.v1+json"} <= kinds


def test_the_rendered_notebooks_are_these():
    rendered = {path.stem: path.read_text() for path in (ROOT / "docs/notebooks").glob("*.md")}
    assert set(rendered) == {path.stem for path in NOTEBOOKS}
    for path in NOTEBOOKS:
        place = 0
        for cell in read(path)[0].cells:
            place = rendered[path.stem].find(cell.source, place)
            assert place >= 0, f"{path.name} has changed since it was rendered; run `make docs`"
    for picture in re.findall(r"\]\((.+?\.png)\)", "".join(rendered.values())):
        assert (ROOT / "docs/notebooks" / picture).exists()
