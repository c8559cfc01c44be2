"""Pictures of pages and figures, taken by a headless Chromium: for documents that cannot run a script."""

from __future__ import annotations

import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from workbench.errors import UserError

if TYPE_CHECKING:
    import plotly.graph_objects as go

CHROMIUM = ("chromium", "chromium-browser", "google-chrome")
"""Names a browser is looked for by."""


def chromium() -> str:
    """Where Chromium is. Raises UserError if there is none."""
    found = next(filter(None, map(shutil.which, CHROMIUM)), None)
    if found is None:
        raise UserError("There is no Chromium here to take a picture with; install one.")
    return found


def photograph(page: Path, picture: Path, width: int, height: int) -> Path:
    """Takes a picture of a page, `width` x `height` pixels, and returns its path. Raises UserError if there is no Chromium."""
    browser = chromium()
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", f"--window-size={width},{height}"]
    subprocess.run([browser, *flags, f"--screenshot={picture}", page.resolve().as_uri()], check=True, capture_output=True)
    return picture


def photograph_figure(figure: go.Figure, picture: Path, width: int = 1000) -> Path:
    """Takes a picture of one figure, `width` pixels wide and as high as it says. Raises UserError as `photograph` does."""
    height = int(figure.layout.height or 450)
    drawn = figure.to_html(
        include_plotlyjs=True, default_width=f"{width}px", default_height=f"{height}px", config={"displayModeBar": False}
    )
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "figure.html"
        page.write_text(drawn.replace("<body>", "<body style='margin: 0'>"), encoding="utf-8")
        return photograph(page, picture, width, height)
