"""Starts the server: Streamlit's own, with the options that this app needs."""

from __future__ import annotations

import importlib.util
import socket
from pathlib import Path

from workbench.errors import UserError
from workbench.plots.look import LIGHT

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
    "theme.primaryColor": LIGHT.high,
}


def launch(host: str, port: int) -> None:
    """Serves until it is stopped. Raises UserError if Streamlit is missing or the address cannot be had."""
    if importlib.util.find_spec("streamlit") is None:
        raise UserError("The dashboard needs Streamlit; install it with: pip install 'workbench-llm[dashboard]'.")
    check_free(host, port)
    from streamlit.web.cli import main

    options = {**OPTIONS, "server.address": host, "server.port": str(port)}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    main(["run", str(APP), *arguments], standalone_mode=False)


def check_free(host: str, port: int) -> None:
    """Raises UserError if nothing can listen there, which Streamlit would say in the log, or answer by taking another port."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot listen on {host}:{port} ({reason}); choose another with --port N (1024 to 65535) and --host H."
        ) from None
