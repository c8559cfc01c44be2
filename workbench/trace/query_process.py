"""The process a limited query runs in, and the rules for every query. It is run as a file and imports nothing of ours.

Standard input is the query; the folder it is started in holds `TABLE.arrow`, and gets the answer.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from pathlib import Path

import duckdb
import pyarrow as pa

ANSWER = "answer.out"
SAID = 3
"""The exit status of a query that failed with a message."""
CELL_CHARACTERS = 10_000
ANSWER_BYTES = 2**25

_SETTINGS = {
    "enable_external_access": False,
    "allow_community_extensions": False,
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
}


class Refused(Exception):
    """A query that is not run."""


FAILURES = (duckdb.Error, Refused, pa.ArrowException, ValueError, OverflowError, MemoryError)
"""What a query may raise, by itself or when its rows are taken over."""


def connection(memory_bytes: int | None = None) -> duckdb.DuckDBPyConnection:
    """A database in memory whose queries reach no file, no network, no extension, no setting and no Python variable."""
    limit = {} if memory_bytes is None else {"memory_limit": f"{memory_bytes}B", "threads": 1, "temp_directory": ""}
    made = duckdb.connect(config={**_SETTINGS, **limit})
    with contextlib.suppress(duckdb.CatalogException):  # named otherwise before DuckDB 2; external access covers it there
        made.execute("set python_enable_replacements = false")
    made.execute("set lock_configuration = true")
    return made


def executed(made: duckdb.DuckDBPyConnection, text: str) -> duckdb.DuckDBPyConnection:
    """The connection with the query under way. Raises Refused for anything but exactly one SELECT."""
    statements = made.extract_statements(text)
    if len(statements) != 1:
        raise Refused(f"it has {len(statements)} statements; write exactly one SELECT.")
    if statements[0].type != duckdb.StatementType.SELECT:
        raise Refused(f"only a SELECT is run here, and this is {statements[0].type.name}.")
    return made.execute(statements[0])


def main(max_rows: int, seconds: float, memory_bytes: int) -> int:
    """Runs the query on standard input; says on standard error what is wrong with it."""
    files = list(Path().glob("*.arrow"))
    bound_memory(memory_bytes + sum(file.stat().st_size for file in files))
    deadline = threading.Timer(seconds, give_up, [seconds])
    deadline.daemon = True
    deadline.start()
    try:
        with connection(memory_bytes // 2) as made:
            for file in files:
                made.register(file.stem, pa.ipc.open_file(pa.memory_map(str(file))).read_all())
            text = sys.stdin.buffer.read().decode("utf-8", "replace")
            write_rows(executed(made, text), max_rows + 1)
    except MemoryError:
        return said("it took more memory than it may; ask for less.")
    except FAILURES as error:
        return said(str(error))
    return 0


def bound_memory(num_bytes: int) -> None:
    """Bounds the address space of this process, where the system can."""
    try:
        import resource
    except ImportError:  # Windows has no such bound; time and DuckDB's own memory limit hold there, too
        return
    already = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if sys.platform == "linux" else 0
    resource.setrlimit(resource.RLIMIT_AS, (already + num_bytes, already + num_bytes))


def give_up(seconds: float) -> None:
    """Ends this process, whatever it is doing."""
    said(f"it took more than {seconds:g} s; ask for less.")
    os._exit(SAID)


def said(why: str) -> int:
    """Says why on standard error; returns the exit status for it."""
    sys.stderr.write(why)
    sys.stderr.flush()
    return SAID


def write_rows(made: duckdb.DuckDBPyConnection, max_rows: int) -> None:
    """Writes the first rows to the answer's file."""
    rows, columns = [], [column[0] for column in made.description or ()]
    size = 0
    for row in iter(made.fetchone, None):
        rows.append([shown(value) for value in row])
        size += sum(len(value) if isinstance(value, str) else 8 for value in rows[-1])
        if size > ANSWER_BYTES:
            raise Refused(f"its rows have more than {ANSWER_BYTES:,} bytes; ask for less.")
        if len(rows) == max_rows:
            break
    table = pa.table([column_of([row[place] for row in rows]) for place in range(len(columns))], names=columns)
    with pa.OSFile(ANSWER, "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)


def shown(value: object) -> object:
    """A number, a truth value or null as it is; anything else as text of bounded length."""
    if value is None or isinstance(value, bool | float) or (isinstance(value, int) and abs(value) < 2**63):
        return value
    text = str(value)
    return text if len(text) <= CELL_CHARACTERS else f"{text[:CELL_CHARACTERS]}…"


def column_of(values: list) -> pa.Array:
    """The values as one Arrow column; as text if they are of several kinds."""
    try:
        return pa.array(values)
    except pa.ArrowException:
        return pa.array([None if value is None else str(value) for value in values], pa.string())


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3])))
