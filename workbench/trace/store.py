"""How a trace lies on disk: `meta.json` and one folder of Parquet parts per table, appended while running.

Every part is written under a temporary name and renamed, and `meta.json` says `complete: false` until the end: a
killed process leaves a trace that opens and says what it lacks.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from workbench.errors import UserError
from workbench.trace.schema import FORMAT_VERSION, TABLES

ROWS_A_PART = 50_000
_PARTS_IN_MEMORY = 64


class TraceWriter:
    """Collects rows; appending a tuple to a list is all that happens while a model runs.

    With a directory, `flush` moves full lists to Parquet parts; without one, everything stays in memory.
    """

    def __init__(self, meta: dict[str, Any], directory: Path | None = None):
        self.meta = {"format_version": FORMAT_VERSION, "complete": False, **meta}
        self.rows: dict[str, list[tuple]] = {name: [] for name in TABLES}
        self.directory = directory
        self._parts = 0
        self._columns: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
        """Rows that came as columns, and those before them, until they are written."""
        self._written: dict[str, list[pa.Table]] = {name: [] for name in TABLES}
        if directory is not None:
            prepare_directory(directory)
            write_meta(directory, self.meta)

    def add(self, table: str, *row: Any) -> None:
        """Appends one row, its values in the order of the table's schema."""
        self.rows[table].append(row)

    def extend(self, table: str, rows: Iterable[tuple]) -> None:
        """Appends several rows."""
        self.rows[table].extend(rows)

    def add_columns(self, table: str, *columns: np.ndarray | int) -> None:
        """Appends many rows at once, column by column in the order of the table's schema; a number holds for all rows."""
        length = next(len(column) for column in columns if isinstance(column, np.ndarray))
        whole = [column if isinstance(column, np.ndarray) else np.full(length, column) for column in columns]
        arrays = [pa.array(column, field.type) for column, field in zip(whole, TABLES[table], strict=True)]
        self._columns[table] = [*self._waiting(table), pa.table(arrays, schema=TABLES[table])]
        self.rows[table].clear()

    def leave_out(self, step: int, phase: str, batch: int, tokens: int) -> None:
        """Takes back the rows of a forward call that did not finish, none of them written yet, and says so in the meta."""
        for name, rows in self.rows.items():
            if "step" in TABLES[name].names:
                at = TABLES[name].get_field_index("step")
                rows[:] = [row for row in rows if row[at] != step]
                self._columns[name] = [part.filter(pc.not_equal(part["step"], step)) for part in self._columns[name]]
        self.meta.setdefault("unfinished_steps", []).append({"step": step, "phase": phase, "batch": batch, "tokens": tokens})

    def update_meta(self, **meta: Any) -> None:
        """Changes what the meta says, on disk too."""
        self.meta |= meta
        if self.directory is not None:
            write_meta(self.directory, self.meta)

    def flush(self, everything: bool = False) -> None:
        """Writes the tables that have grown large, or all of them."""
        for name, rows in self.rows.items():
            waiting = len(rows) + sum(part.num_rows for part in self._columns[name])
            if not waiting or (waiting < ROWS_A_PART and not everything):
                continue
            table = pa.concat_tables(self._waiting(name))
            if self.directory is None:
                self._written[name] = _joined([*self._written[name], table])
            else:
                write_part(self.directory, name, self._parts, table)
                self._parts += 1
            rows.clear()
            self._columns[name].clear()

    def _waiting(self, name: str) -> list[pa.Table]:
        """Rows of a table that were not written yet."""
        return [*self._columns[name], *([to_arrow(name, self.rows[name])] if self.rows[name] else [])]

    def close(self, **meta: Any) -> None:
        """Writes what is left and marks the trace complete, or not where `meta` says so."""
        self.flush(everything=True)
        self.update_meta(**{"complete": True, **meta})

    def tables(self) -> dict[str, pa.Table]:
        """All rows so far, as Arrow tables."""
        self.flush(everything=True)
        if self.directory is not None:
            return {name: read_table(self.directory, name) for name in TABLES}
        return {name: pa.concat_tables([TABLES[name].empty_table(), *self._written[name]]) for name in TABLES}


def _joined(parts: list[pa.Table]) -> list[pa.Table]:
    """The parts, made one where they have become many, as when a trace is read again and again while it grows."""
    return parts if len(parts) < _PARTS_IN_MEMORY else [pa.concat_tables(parts).combine_chunks()]


def to_arrow(name: str, rows: list[tuple]) -> pa.Table:
    """Rows of a table as an Arrow table with its schema."""
    schema = TABLES[name]
    columns = list(zip(*rows, strict=True)) if rows else [()] * len(schema)
    return pa.table([pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema)


def prepare_directory(directory: Path) -> None:
    """Makes an empty directory for a trace. Raises UserError if it cannot be written or holds something else."""
    try:
        if directory.is_dir() and any(directory.iterdir()):
            if not (directory / "meta.json").exists():
                raise UserError(f"{directory} is not empty and holds no trace; choose another folder.")
            shutil.rmtree(directory)
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"Cannot write to {directory} ({error.strerror}); choose another folder.") from None


def write_meta(directory: Path, meta: dict[str, Any]) -> None:
    """Writes `meta.json`, replacing it whole. Raises UserError if it cannot."""
    with _replacing(directory / "meta.json") as temporary:
        temporary.write_text(json.dumps(meta, indent=1))


def write_part(directory: Path, name: str, number: int, table: pa.Table) -> None:
    """Writes one Parquet part of a table. Raises UserError if it cannot."""
    with _replacing(directory / name / f"part-{number:06d}.parquet") as temporary:
        pq.write_table(table, temporary, compression="zstd")


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary file that takes the target's place once it is whole."""
    temporary = target.with_suffix(".tmp")
    try:
        target.parent.mkdir(exist_ok=True)
        yield temporary
        os.replace(temporary, target)
    except OSError as error:
        raise UserError(
            f"Cannot write the trace to {target} ({error.strerror or error}); make room, or choose another folder."
        ) from error


def read_meta(directory: Path) -> dict[str, Any]:
    """Reads and checks `meta.json`. Raises UserError for what is no trace of this format version."""
    path = directory / "meta.json"
    if not path.is_file():
        raise UserError(
            f"{directory} is not a trace: it has no meta.json. Give the folder that `workbench profile --out` made."
        )
    try:
        meta = json.loads(path.read_text())
        version = meta["format_version"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{path} is damaged, so {directory} cannot be opened; record the trace again.") from None
    if version != FORMAT_VERSION:
        raise UserError(
            f"{directory} has trace format {version}, and this version reads format {FORMAT_VERSION}; "
            "record it again or open it with the version that wrote it."
        )
    return meta


def read_table(directory: Path, name: str) -> pa.Table:
    """Reads all parts of a table. Raises UserError, naming the file, if one was cut short."""
    parts = []
    for path in sorted((directory / name).glob("*.parquet")):
        try:
            parts.append(pq.read_table(path, schema=TABLES[name]))
        except (pa.ArrowInvalid, pa.ArrowTypeError, OSError):
            raise UserError(
                f"{path} is damaged or cut short; record the trace again, or delete that part to read the rest."
            ) from None
    return pa.concat_tables(parts) if parts else TABLES[name].empty_table()
