"""A trace: what was recorded of a run, as a value. Everything else is derived from it."""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from workbench.errors import UserError
from workbench.trace import store
from workbench.trace.anatomy import Anatomy
from workbench.trace.display import RichDisplay, table_html
from workbench.trace.schema import PHASES, TABLES


class Trace(RichDisplay):
    """Tables of facts and what they are about. Immutable: `select` and `merge` return new traces."""

    def __init__(self, meta: dict[str, Any], tables: dict[str, pa.Table]):
        self.meta = meta
        self._tables = tables

    @classmethod
    def load(cls, path: str | Path) -> Trace:
        """Opens a trace directory. Raises UserError if it is none, damaged, or of another format version."""
        directory = Path(path)
        meta = store.read_meta(directory)
        return cls(meta, {name: store.read_table(directory, name) for name in TABLES})

    def save(self, path: str | Path) -> Path:
        """Writes the trace as a directory of Parquet files and returns its path."""
        directory = Path(path)
        store.prepare_directory(directory)
        for number, (name, table) in enumerate(self._tables.items()):
            if table.num_rows:
                store.write_part(directory, name, number, table)
        store.write_meta(directory, self.meta)
        return directory

    @property
    def complete(self) -> bool:
        """Whether the run that wrote this trace came to its end."""
        return bool(self.meta.get("complete"))

    @property
    def notes(self) -> list[str]:
        """What was not measured or not checked, in sentences; empty for nearly every trace."""
        unfinished = len(self.meta.get("unfinished_steps", ()))
        cut = [f"{unfinished} forward calls did not finish and are left out."] if unfinished else []
        return [*self.meta.get("notes", ()), *cut]

    @property
    def anatomy(self) -> Anatomy:
        """The model's anatomy."""
        return Anatomy.from_dict(self.meta["anatomy"])

    @property
    def setup(self) -> str:
        """The setups that ruled the run, in order, such as `dense, then h2o(budget=0.2)`."""
        changes = self.meta.get("swaps", [])
        return ", then ".join([self.meta.get("setup", "dense"), *(change["to"] for change in changes)])

    def arrow(self, name: str) -> pa.Table:
        """A table as Arrow. Raises UserError for a name that is not a table."""
        if name not in self._tables:
            raise UserError(f"A trace has no table {name!r}; its tables are {', '.join(TABLES)}.")
        return self._tables[name]

    def table(self, name: str) -> pd.DataFrame:
        """A table as a DataFrame."""
        return self.arrow(name).to_pandas()

    def sql(self, query: str) -> pd.DataFrame:
        """Runs one SELECT of DuckDB's over the tables. It reaches no file, no network and no setting.

        Raises UserError for anything else, and with DuckDB's message if it fails. `workbench.trace.query.limited` bounds time,
        memory and rows as well.
        """
        from workbench.trace.query import query as run

        return run(self._tables, query)

    def select(self, *, phase: str | None = None, layers: Sequence[int] | None = None, steps: range | None = None) -> Trace:
        """The part of the trace in a phase, in some layers, or in a range of steps."""
        steps_table = self.arrow("steps")
        keep = pd.Series(True, index=range(steps_table.num_rows))
        if phase is not None:
            if phase not in PHASES:
                raise UserError(f"There is no phase {phase!r}; the phases are {', '.join(PHASES)}.")
            keep &= steps_table["phase"].to_pandas() == phase
        if steps is not None:
            keep &= steps_table["step"].to_pandas().isin(steps)
        wanted = {"step": steps_table["step"].filter(pa.array(keep)), "layer": None if layers is None else pa.array(layers)}
        tables = {}
        for name, table in self._tables.items():
            for column, values in wanted.items():
                if values is not None and column in table.column_names:
                    table = table.filter(pc.is_in(table[column], values.cast(pa.int64())))
            tables[name] = table
        return Trace(self.meta, tables)

    @staticmethod
    def merge(traces: dict[str, Trace]) -> Trace:
        """Several traces as one: every table gets a `run` column with the name each came under."""
        if not traces:
            raise UserError("There is nothing to merge: give at least one trace by name.")
        tables = {
            name: pa.concat_tables(
                [
                    trace.arrow(name).append_column("run", pa.array([run] * trace.arrow(name).num_rows, pa.string()))
                    for run, trace in traces.items()
                ]
            )
            for name in TABLES
        }
        first = next(iter(traces.values()))
        meta = {**first.meta, "runs": {run: trace.meta for run, trace in traces.items()}, "unfinished_steps": []}
        meta["notes"] = [f"{run}: {note}" for run, trace in traces.items() for note in trace.notes]
        return Trace({**meta, "complete": all(trace.complete for trace in traces.values())}, tables)

    def flops(self, by: str | Sequence[str] | None = None, convention: str = "full") -> int | pd.DataFrame:
        """FLOPs of matrix products, in all or by phase, component, step or layer. See `workbench.cost.flops`."""
        from workbench.cost.flops import trace_flops

        return trace_flops(self, by, convention)

    def bytes(
        self, by: str | Sequence[str] | None = None, model: str = "fused", on_chip_bytes: int | None = None
    ) -> int | pd.DataFrame:
        """Bytes moved, by the eager or the fused model. See `workbench.cost.bytes`.

        `on_chip_bytes` is the fast memory a fused attention kernel may use per block; None is that of an A100.
        """
        from workbench.cost.bytes import ON_CHIP_BYTES, trace_bytes

        return trace_bytes(self, by, model, ON_CHIP_BYTES if on_chip_bytes is None else on_chip_bytes)

    def energy(self) -> pd.DataFrame:
        """Energy (measured) by phase and device: joules and their error, joules a token, mean power, or why not.

        See `workbench.cost.energy`.
        """
        from workbench.cost.energy import phase_energy

        return phase_energy(self)

    def routing(self) -> pd.DataFrame:
        """One row a layer: how evenly its experts are used, how many a step hits and reads, and how alike neighbours choose.

        Raises UserError if no expert was called. See `workbench.cost.routing_layers`.
        """
        from workbench.cost.routing_layers import routing_layers

        return routing_layers(self)

    def summary(self) -> pd.DataFrame:
        """One row a phase: tokens, seconds and joules (measured), FLOPs and bytes (modelled), cache bytes at its end."""
        from workbench.cost.metrics import phase_summary

        return phase_summary(self)

    def to_perfetto(self, path: str | Path) -> Path:
        """Writes Chrome/Perfetto JSON and returns its path. Raises UserError if it cannot be written."""
        from workbench.trace.perfetto import write_perfetto

        return write_perfetto(self, Path(path))

    def to_csv(self, path: str | Path) -> Path:
        """Writes every table that has rows as a CSV file into a folder and returns it."""
        folder = Path(path)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for name, table in self._tables.items():
                if table.num_rows:
                    table.to_pandas().to_csv(folder / f"{name}.csv", index=False)
        except OSError as error:
            raise UserError(f"Cannot write to {folder} ({error.strerror}); choose another folder.") from None
        return folder

    def __repr__(self) -> str:
        steps = self.arrow("steps").num_rows
        state = "" if self.complete else ", incomplete"
        if self.arrow("unattributed").num_rows:
            by = self.flops(by="component").set_index("component")["flops"]
            state += f", {by['unattributed'] / by.sum():.1%} of FLOPs unattributed"
        state += f", {len(self.notes)} notes" if self.notes else ""
        return f"Trace({self.meta['anatomy']['class_name']}, {steps} steps{state})"

    def _repr_html_(self) -> str:
        """What was recorded, by phase; what it costs takes longer to work out, and is `summary()`."""
        from workbench.cost.durations import step_ns

        steps = self.table("steps")
        by_phase = steps.assign(seconds=step_ns(steps) / 1e9).groupby("phase", sort=False)
        facts = by_phase.agg(calls=("step", "size"), tokens=("tokens", "sum"), seconds=("seconds", "sum")).reset_index()
        notes = "".join(f"<li>{html.escape(note)}</li>" for note in self.notes)
        title = f"<p><b>{html.escape(repr(self))}</b> &nbsp; setup {html.escape(self.setup)}</p>"
        return f"{title}{table_html(facts)}<ul>{notes}</ul>" if notes else title + table_html(facts)
