"""Comparisons that were run here, kept in the user's cache directory and named by ids that links may carry."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path

from workbench.errors import UserError
from workbench.folders import cache_directory
from workbench.trace.comparison import Comparison

_ID = re.compile(r"[a-z0-9-]{1,80}")


def cells_folder() -> Path:
    """Where finished parts of comparisons lie, from which a cancelled one goes on."""
    return cache_directory() / "dashboard"


def keep(comparison: Comparison) -> str:
    """Stores a comparison and returns its id."""
    about = f"{comparison.about['workload']}-{comparison.about['model']}".lower()
    name = re.sub("[^a-z0-9]+", "-", about).strip("-")[:60]
    digest = hashlib.sha256(json.dumps(comparison.to_dict(), sort_keys=True).encode()).hexdigest()[:8]
    comparison.save(_folder() / f"{name}-{digest}")
    return f"{name}-{digest}"


def ids() -> list[str]:
    """All that are kept, the newest first."""
    found = _folder().glob("*/comparison.json")
    return [
        path.parent.name for path in sorted(found, key=lambda path: -path.stat().st_mtime) if _ID.fullmatch(path.parent.name)
    ]


def opened(id: str) -> Comparison:
    """The comparison of an id. Raises UserError for what is no id, and if there is none of it."""
    if not _ID.fullmatch(id) or not (_folder() / id).is_dir():
        raise UserError(f"There is no comparison {id!r} here; choose one of the earlier ones, or run it again.")
    return Comparison.load(_folder() / id)


def _folder() -> Path:
    return cache_directory() / "dashboard" / "comparisons"
