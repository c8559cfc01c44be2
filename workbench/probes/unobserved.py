"""Forward calls that no profile takes for the user's run, such as a check of our own."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

_here = threading.local()


@contextmanager
def unobserved() -> Iterator[None]:
    """Profiles see nothing of what this thread runs inside the block."""
    before = is_unobserved()
    _here.unobserved = True
    try:
        yield
    finally:
        _here.unobserved = before


def is_unobserved() -> bool:
    """Whether this thread is inside such a block."""
    return getattr(_here, "unobserved", False)
