"""A figure as a picture, for papers and slides. Everything else here works without what it needs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import plotly.graph_objects as go

from workbench.errors import UserError


def png(figure: go.Figure, path: str | Path, width: int = 1000, scale: float = 2) -> Path:
    """Writes a PNG `width` x `scale` pixels wide, and returns its path. Needs the package kaleido and a Chrome.

    Raises UserError where one of them is missing, or the file cannot be written.
    """
    if importlib.util.find_spec("kaleido") is None:
        raise UserError(
            "A PNG needs the package kaleido, which is missing; run 'pip install kaleido', then 'plotly_get_chrome'."
        )
    path = Path(path)
    try:
        path.write_bytes(figure.to_image(format="png", width=width, scale=scale))
    except RuntimeError as error:
        if "Chrome" not in str(error):
            raise
        raise UserError("A PNG needs a Chrome, and kaleido found none; run 'plotly_get_chrome'.") from None
    except OSError as error:
        raise UserError(f"Cannot write the PNG to {path} ({error.strerror}); choose another path.") from None
    return path
