"""SQL over the tables of a trace: one SELECT that reads them and nothing else, also with limits for a stranger's query.

The files of the machine, the network, extensions and settings are out of reach of any query (`connection`). Time and memory are
bounded only in a process of its own (`limited`): one call of `repeat` cannot be interrupted and may ask for gigabytes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import pandas as pd
import pyarrow as pa

from workbench.errors import UserError
from workbench.trace import query_process
from workbench.trace.schema import HALF_FLOATS

MAX_QUERY_CHARACTERS = 10_000
_START_S = 10.0
"""What a process may take to start on a busy machine, before the query's own time begins."""
_PASSED_ON = ("LD_LIBRARY_PATH", "SYSTEMROOT")
_ENVIRONMENT = {"ARROW_DEFAULT_MEMORY_POOL": "system", "MALLOC_ARENA_MAX": "1", "OMP_NUM_THREADS": "1"}
"""Allocators that do not reserve in advance, since the process may only have so much address space."""


@dataclass(frozen=True)
class Answer:
    """The rows of a limited query."""

    rows: pd.DataFrame
    cut: bool
    """Whether there were more rows than were asked for."""


def query(tables: Mapping[str, pa.Table], text: str) -> pd.DataFrame:
    """Runs one SELECT in this process, without limits. Raises UserError with DuckDB's message if it cannot."""
    with query_process.connection() as connection:
        for name, table in tables.items():
            connection.register(name, without_half_floats(table))
        try:
            return query_process.executed(connection, text).df()
        except query_process.FAILURES as error:
            raise _failed(str(error)) from None


def limited(
    tables: Mapping[str, pa.Table],
    text: str,
    *,
    max_rows: int = 1000,
    seconds: float = 5.0,
    memory_bytes: int = 2**30,
) -> Answer:
    """Runs one SELECT in a process that may take so much time and memory, and returns its first rows.

    A text in a cell is cut short; a value that is no number, truth value or text comes as text.

    Raises:
        UserError: for anything but one SELECT, one that fails, and one that takes more.
    """
    if len(text) > MAX_QUERY_CHARACTERS:
        raise UserError(f"The query has {len(text):,} characters and at most {MAX_QUERY_CHARACTERS:,} are taken; shorten it.")
    mentioned = [name for name in tables if name in text.lower()]
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in mentioned or tables:
            _write(folder / f"{name}.arrow", without_half_floats(tables[name]))
        options = [str(max_rows), str(seconds), str(memory_bytes)]
        # isolated from the folder, the variables and the packages around it: it imports duckdb and pyarrow alone
        command = [sys.executable, "-I", str(Path(query_process.__file__)), *options]
        try:
            done = subprocess.run(
                command,
                input=text.encode("utf-8", "replace"),
                cwd=folder,
                env=_ENVIRONMENT | {name: os.environ[name] for name in _PASSED_ON if name in os.environ},
                capture_output=True,
                timeout=_START_S + seconds,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"The query took more than {seconds:g} s; ask for less.") from None
        answer = folder / query_process.ANSWER
        if done.returncode != 0 or not answer.exists():
            said = done.stderr.decode("utf-8", "replace") if done.returncode == query_process.SAID else ""
            raise _failed(said) if said else UserError("The query took more memory than it may; ask for less.")
        with pa.OSFile(str(answer)) as file:
            table = pa.ipc.open_file(file).read_all()
    rows = table.slice(0, max_rows).rename_columns(_apart(table.column_names)).to_pandas()
    return Answer(rows, cut=table.num_rows > max_rows)


def without_half_floats(table: pa.Table) -> pa.Table:
    """The table with float16 lists widened, which DuckDB cannot read."""
    wide = [field.with_type(pa.list_(pa.float32())) if field.type == HALF_FLOATS else field for field in table.schema]
    return table.cast(pa.schema(wide))


def _write(path: Path, table: pa.Table) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def _apart(names: list[str]) -> list[str]:
    """The names, those that come again numbered."""
    seen: Counter[str] = Counter()
    apart = []
    for name in names:
        seen[name] += 1
        apart.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return apart


def _failed(said: str) -> UserError:
    """One sentence of what DuckDB said."""
    first = (said.strip().splitlines() or ["it gave no reason"])[0][:300]
    return UserError(f"The query failed: {first}")
