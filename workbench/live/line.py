"""Whose turn it is: one run at a time on a model, first come, first served, and everyone sees who waits."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

_RECHECK_S = 0.2
"""How often one who waits looks whether it still wants its turn."""


@dataclass(eq=False)
class _Ticket:
    name: str


class Line:
    """The line before one model."""

    def __init__(self):
        self._changed = threading.Condition()
        self._tickets: list[_Ticket] = []

    @property
    def names(self) -> tuple[str, ...]:
        """Whoever has the turn, then those who wait, in order."""
        with self._changed:
            return tuple(ticket.name for ticket in self._tickets)

    @contextmanager
    def turn(
        self, name: str, wanted: Callable[[], bool] = lambda: True, waiting: Callable[[int], Any] = lambda _: None
    ) -> Iterator[bool]:
        """Waits for the turn and gives it back at the end of the block. Yields False if it was not `wanted` any more.

        `waiting` is called with the number of those before, while there are any.
        """
        ticket = _Ticket(name)
        with self._changed:
            self._tickets.append(ticket)
        try:
            yield self._reached(ticket, wanted, waiting)
        finally:
            with self._changed:
                self._tickets.remove(ticket)
                self._changed.notify_all()

    def _reached(self, ticket: _Ticket, wanted: Callable[[], bool], waiting: Callable[[int], Any]) -> bool:
        while wanted():
            with self._changed:
                before = self._tickets.index(ticket)
                if not before:
                    return True
                self._changed.wait(_RECHECK_S)
            waiting(before)
        return False


_LINES: weakref.WeakKeyDictionary[Any, Line] = weakref.WeakKeyDictionary()
_LINES_LOCK = threading.Lock()


def line_of(model: Any) -> Line:
    """The line before a model (`LM.model`): the same for all who use it in this process."""
    with _LINES_LOCK:
        return _LINES.setdefault(model, Line())
