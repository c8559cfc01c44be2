"""Registration next to the definition: the only list there is of methods and workloads."""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from workbench.errors import UserError

T = TypeVar("T")


class Registry(Generic[T]):
    """Named things of one kind, in the order they were registered."""

    def __init__(self, kind: str):
        self.kind = kind
        self._entries: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorator that enters a class or function under `name`. Raises ValueError if another module holds it."""

        def enter(entry: T) -> T:
            held = self._entries.get(name)
            if held is not None and _home(held) != _home(entry):
                raise ValueError(f"Two {self.kind}s are named {name!r}: one in {held.__module__}, one in {entry.__module__}.")
            self._entries[name] = entry
            return entry

        return enter

    def __getitem__(self, name: str) -> T:
        if name not in self._entries:
            close = difflib.get_close_matches(name, self._entries, n=1)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(f"There is no {self.kind} named {name!r}.{hint} Known: {', '.join(self._entries)}.")
        return self._entries[name]

    def __contains__(self, name: str) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def items(self):
        """Name and entry, in the order of registration."""
        return self._entries.items()

    def values(self):
        """The entries, in the order of registration."""
        return self._entries.values()


def import_folder(package_name: str, path: list[str]) -> None:
    """Imports every module below a package, so that each can register what it defines."""
    for module in sorted(pkgutil.walk_packages(path, f"{package_name}."), key=lambda found: found.name):
        importlib.import_module(module.name)


def _home(entry) -> tuple[str, str]:
    return entry.__module__, entry.__qualname__
