"""`workbench lab`: the notebooks in a folder of the user's, and JupyterLab there."""

from __future__ import annotations

import importlib.util
import json
import os
import socket
import subprocess
import sys
import time
import tomllib
import urllib.request
from pathlib import Path

import pytest

import workbench as wb
from workbench.lab import check_lab, copy_notebooks, shipped

needs_lab = pytest.mark.skipif(importlib.util.find_spec("jupyterlab") is None, reason="JupyterLab is not installed")


def test_all_notebooks_are_copied_and_what_was_changed_stays(tmp_path):
    folder = tmp_path / "mine/notebooks"
    assert copy_notebooks(folder) == []
    assert [path.name for path in sorted(folder.iterdir())] == [path.name for path in shipped()]
    assert all((folder / path.name).read_bytes() == path.read_bytes() for path in shipped())
    changed, gone = (folder / path.name for path in shipped()[:2])
    changed.write_text("mine")
    gone.unlink()
    assert copy_notebooks(folder) == [changed]
    assert changed.read_text() == "mine" and gone.exists()


def test_an_installed_package_has_them():
    setuptools = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert setuptools["package-dir"]["workbench.notebooks"] == "notebooks"
    assert setuptools["package-data"]["workbench.notebooks"] == ["*.ipynb"]


def test_a_folder_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(wb.UserError, match=r"Cannot write to .*file/inside"):
        copy_notebooks(tmp_path / "file/inside")


def test_what_is_missing_is_said_before_anything_is_copied(tmp_path):
    """In a process that finds no JupyterLab."""
    code = (
        "import sys; sys.modules['jupyterlab'] = None; sys.argv = ['workbench', 'lab']; from workbench.cli import main; main()"
    )
    ran = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=_environment(), capture_output=True, text=True)
    assert ran.returncode == 2
    assert (
        ran.stderr.strip()
        == "Error: JupyterLab is not installed; install the extra with pip install 'workbench-llm[notebook]'."
    )
    assert not any(tmp_path.iterdir())


@needs_lab
def test_a_port_that_is_taken_is_said():
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with pytest.raises(wb.UserError, match=r"Cannot listen on .*; choose another port with --port"):
            check_lab(other.getsockname()[1])
    with pytest.raises(wb.UserError, match="Cannot listen on 127.0.0.1:70000"):
        check_lab(70000)


@needs_lab
def test_jupyterlab_starts_in_the_folder(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "workbench.cli", "lab", "mine", "--no-browser", "--port", str(port)]
    environment = _environment() | {"JUPYTER_TOKEN": "secret"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            listed = _ask(f"http://127.0.0.1:{port}/api/contents?token=secret", server)
        finally:
            server.terminate()
    assert {entry["name"] for entry in listed["content"]} == {path.name for path in shipped()}


def _environment() -> dict[str, str]:
    """This process' environment, with the code under test first on the path."""
    path = os.pathsep.join([str(Path(wb.__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def _ask(address: str, server: subprocess.Popen) -> dict:
    """What the server answers once it is up."""
    for _ in range(300):
        assert server.poll() is None, server.stdout and server.stdout.read().decode()
        try:
            with urllib.request.urlopen(address, timeout=5) as answer:
                return json.load(answer)
        except OSError:
            time.sleep(0.2)
    raise AssertionError("JupyterLab did not come up")
