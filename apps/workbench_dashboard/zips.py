"""A trace as one file to download."""

from __future__ import annotations

import io
import tempfile
import zipfile
from pathlib import Path

from workbench.trace.trace import Trace


def zipped(trace: Trace) -> bytes:
    """The trace's folder as a zip."""
    packed = io.BytesIO()
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        saved = trace.save(Path(folder) / "run.trace")
        for path in sorted(each for each in Path(saved).rglob("*") if each.is_file()):
            archive.write(path, path.relative_to(folder))
    return packed.getvalue()
