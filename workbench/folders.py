"""Where the workbench keeps what it makes once for a user: converted models and the sheet of this machine."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_path


def cache_directory() -> Path:
    """WORKBENCH_CACHE, or the platform's cache directory."""
    given = os.environ.get("WORKBENCH_CACHE")
    return Path(given) if given else user_cache_path("workbench")
