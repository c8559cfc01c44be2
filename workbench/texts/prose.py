"""English prose that comes with every Python: the language reference topics and long docstrings."""

from __future__ import annotations

import ast
import functools
import hashlib
import sysconfig
from pathlib import Path

HELD_OUT_SHARE = 0.1
"""Share of the documents kept out of training, chosen by a hash of their text."""

_SHORTEST_DOCSTRING = 300


def is_held_out(document: str) -> bool:
    """Whether a document belongs to the held-out tenth, the same tenth on every machine."""
    digest = hashlib.sha256(document.encode()).digest()
    return digest[0] < 256 * HELD_OUT_SHARE


@functools.cache
def topics() -> tuple[str, ...]:
    """The documents of `pydoc_data.topics`, white space folded, in the order of their names."""
    from pydoc_data.topics import topics as by_name

    return tuple(_fold(by_name[name]) for name in sorted(by_name))


@functools.cache
def docstrings() -> tuple[str, ...]:
    """Every docstring of the standard library of 300 characters or more, white space folded."""
    root = Path(sysconfig.get_paths()["stdlib"])
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if {"site-packages", "test", "tests", "idlelib"} & set(path.relative_to(root).parts):
            continue
        for docstring in _docstrings_of(path):
            found[docstring] = None
    return tuple(found)


def held_out_topics() -> tuple[str, ...]:
    """The topics no built-in model was trained on."""
    return tuple(document for document in topics() if is_held_out(document))


def words(seed: int = 0) -> list[str]:
    """The words of all topics: first the held-out ones, starting at a document that depends on `seed`, then the rest."""
    held_out = held_out_topics()
    start = seed % len(held_out)
    known = tuple(document for document in topics() if not is_held_out(document))
    return " ".join(held_out[start:] + held_out[:start] + known).split(" ")


def known_words(seed: int = 0) -> list[str]:
    """The words of the topics that no workload begins with, starting at a document that depends on `seed`."""
    known = tuple(document for document in topics() if not is_held_out(document))
    start = seed % len(known)
    return " ".join(known[start:] + known[:start]).split(" ")


def _docstrings_of(path: Path) -> list[str]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):
        return []
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docs = (ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, kinds))
    return [_fold(doc) for doc in docs if doc and len(doc) >= _SHORTEST_DOCSTRING]


def _fold(text: str) -> str:
    return " ".join(text.split())
