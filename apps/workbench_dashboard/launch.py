"""Starts the server: Streamlit's own, with the options that this app needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from workbench.errors import UserError
from workbench.plots.look import DARK, LIGHT
from workbench.ports import check_free

APP = Path(__file__).parent / "app.py"
UPLOAD_MB = 200
"""Largest file that may be uploaded."""

OPTIONS = {
    "server.headless": "true",  # otherwise it asks for an e-mail address the first time
    "browser.gatherUsageStats": "false",
    "server.maxUploadSize": str(UPLOAD_MB),
    "server.fileWatcherType": "none",  # it would look into every module of torch and transformers
    "runner.magicEnabled": "false",  # it would show every string that stands alone
    "runner.postScriptGC": "false",  # after each run of a fragment it would go through every object of torch, holding the GIL
    "client.showErrorDetails": "type",
    "client.toolbarMode": "minimal",
    "theme.light.primaryColor": LIGHT.high,
    "theme.dark.primaryColor": DARK.high,
}


def launch(host: str, port: int) -> None:
    """Serves until it is stopped. Raises UserError if Streamlit is missing or the address cannot be had."""
    if importlib.util.find_spec("streamlit") is None:
        raise UserError("The dashboard needs Streamlit; install it with: pip install 'workbench-llm[dashboard]'.")
    check_free(host, port)
    from streamlit.web.cli import main

    import workbench.live  # noqa: F401 (torch and transformers, for which the first visitor would have to wait)

    options = {**OPTIONS, "server.address": host, "server.port": str(port)}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    main(["run", str(APP), *arguments], standalone_mode=False)
