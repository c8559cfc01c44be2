"""Whether a server can listen where it is asked to, which servers themselves say late, in a log, or not at all."""

from __future__ import annotations

import socket

from workbench.errors import UserError


def check_free(host: str, port: int) -> None:
    """Raises UserError if nothing can listen there."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            trial.bind((address[0], port, *address[2:]))
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UserError(
            f"Cannot listen on {host}:{port} ({reason}); choose another port with --port N (1024 to 65535)."
        ) from None
