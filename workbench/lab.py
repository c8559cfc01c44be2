"""The notebooks for a user: copied to a folder of theirs, where JupyterLab opens them."""

from __future__ import annotations

import filecmp
import importlib.util
import os
import shutil
from pathlib import Path

from workbench.errors import UserError
from workbench.ports import check_free

HOST = "127.0.0.1"
_PACKAGE = Path(__file__).parent


def shipped() -> list[Path]:
    """The notebooks that come with the workbench: inside an installed package, beside the package in a checkout."""
    inside, beside = (sorted((folder / "notebooks").glob("*.ipynb")) for folder in (_PACKAGE, _PACKAGE.parent))
    return inside or beside


def copy_notebooks(folder: Path) -> list[Path]:
    """Copies those that are not there yet, and returns those that are there and differ, which stay as they are.

    Raises UserError if the folder cannot be written.
    """
    kept = []
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for source in shipped():
            target = folder / source.name
            if not target.exists():
                shutil.copyfile(source, target)
            elif not filecmp.cmp(source, target, shallow=False):
                kept.append(target)
    except OSError as error:
        raise UserError(f"Cannot write to {folder} ({error.strerror}); choose another folder.") from None
    return kept


def check_lab(port: int) -> None:
    """Raises UserError if JupyterLab is not installed, or the port is not free."""
    if importlib.util.find_spec("jupyterlab") is None:
        raise UserError("JupyterLab is not installed; install the extra with pip install 'workbench-llm[notebook]'.")
    check_free(HOST, port)


def start_lab(folder: Path, port: int, browser: bool) -> None:
    """Runs JupyterLab on this computer's own address until it is stopped."""
    from jupyterlab.labapp import LabApp

    as_root = hasattr(os, "geteuid") and os.geteuid() == 0
    options = [f"--ServerApp.root_dir={folder.resolve()}", f"--ip={HOST}", f"--port={port}", "--port-retries=0"]
    LabApp.launch_instance([*options, *([] if browser else ["--no-browser"]), *(["--allow-root"] if as_root else [])])
