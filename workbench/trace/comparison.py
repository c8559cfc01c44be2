"""A comparison: setups on one workload, quality beside cost, one row each. A value: save, load, draw."""

from __future__ import annotations

import html
import json
import shutil
from dataclasses import MISSING, asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd

from workbench.errors import UserError
from workbench.trace.display import RichDisplay
from workbench.trace.trace import Trace

if TYPE_CHECKING:
    import plotly.graph_objects as go

_FILE = "comparison.json"


@dataclass(frozen=True)
class Row:
    """One setup on a workload. Times, memory and energy are measured; FLOPs and bytes moved are modelled.

    FLOPs and bytes are of one sample (mean); seconds are medians; cache bytes are those at the end of a sample (mean).
    """

    setup: str
    score: float
    nll: float
    """Mean negative log-likelihood of the forced tokens, nats a token."""
    kl_to_dense: float
    """Mean KL(dense || setup) of the next token, nats."""
    top1_agreement: float
    """Share of forced positions where the likeliest token is the dense run's."""
    ttft_s: float
    tpot_s: float
    prefill_flops: int
    """Of everything before the first token: the prompt, and what a method rehearses after it."""
    decode_flops: int
    """Of everything after the prefill: appended questions and decoded tokens."""
    decode_bytes: int
    """Fused model, over the same steps as `decode_flops`."""
    kv_physical_bytes: int
    kv_nominal_bytes: int
    peak_memory_bytes: int | None
    peak_memory_reason: str | None
    fired_layers: int
    layers: int
    fired_steps: int
    steps: int
    joules: float | None
    joules_reason: str | None
    turn_scores: tuple[float, ...]
    """Mean score of the 1st, 2nd, ... turn after the one compression."""
    depth_scores: tuple[tuple[int, float], ...]
    """Mean score of the turns whose answer stands at a depth (percent of the context), by depth."""
    ffn_read_bytes: int | None = None
    """Weights of FFNs, experts or not, read over the same steps as `decode_bytes`, of which they are a part; modelled."""
    ffn_resident_bytes: int | None = None
    """Weights of FFNs that the setup computes with."""
    rerouted: tuple[int, int, int, int] | None = None
    """Layers where a routing method changed what is computed, of how many it saw, and steps; None without one."""

    decoded: tuple[int, int] | None = None
    """Tokens that a decoding method took from a draft or another model, of all it found; None without one."""
    decoding: tuple[tuple[str, float], ...] = ()
    """What a decoding method says of itself, by name; a sample on average."""

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Row:
        """A row from what `asdict` and JSON made of it. Raises KeyError or TypeError for something else."""
        values = {column.name: data[column.name] for column in fields(cls) if column.name in data or column.default is MISSING}
        if values.get("rerouted") is not None:
            values["rerouted"] = tuple(values["rerouted"])
        if values.get("decoded") is not None:
            values["decoded"] = tuple(values["decoded"])
        if "decoding" in values:
            values["decoding"] = tuple((str(name), float(value)) for name, value in values["decoding"])
        depths = tuple((int(depth), float(score)) for depth, score in values["depth_scores"])
        return cls(**{**values, "turn_scores": tuple(values["turn_scores"]), "depth_scores": depths})

    @property
    def fired(self) -> str:
        """The proof that the methods ran, in words."""
        said = [f"{self.fired_layers}/{self.layers} layers, {self.fired_steps}/{self.steps} steps"] if self.steps else []
        if self.rerouted is not None:
            layers, all_layers, steps, all_steps = self.rerouted
            said.append(f"routing {layers}/{all_layers} layers, {steps}/{all_steps} steps")
        if self.decoded is not None:
            said.append(f"decoding {self.decoded[0]}/{self.decoded[1]} tokens")
        return "; ".join(said) or "nothing to do"


@dataclass(frozen=True)
class Comparison(RichDisplay):
    """The rows of a comparison, what was compared, and a trace of each setup's first sample."""

    about: dict[str, Any]
    """Model, workload and its settings, environment."""
    rows: tuple[Row, ...]
    traces: dict[str, Trace] = field(repr=False)

    @property
    def table(self) -> pd.DataFrame:
        """One row a setup."""
        several = ("turn_scores", "depth_scores", "rerouted", "decoded", "decoding")
        return pd.DataFrame([{**asdict(row), "fired": row.fired} for row in self.rows]).drop(columns=list(several))

    @property
    def turns(self) -> pd.DataFrame:
        """Scores of the 1st, 2nd, ... turn after the one compression: one row a setup, one column a turn."""
        scores = [dict(enumerate(row.turn_scores, 1)) for row in self.rows]
        return pd.DataFrame(scores, index=pd.Index([row.setup for row in self.rows], name="setup"))

    @property
    def depths(self) -> pd.DataFrame:
        """Scores by where the answer stands, in percent of the context: one row a setup, one column a depth; may be empty."""
        scores = [dict(row.depth_scores) for row in self.rows]
        return pd.DataFrame(scores, index=pd.Index([row.setup for row in self.rows], name="setup"))

    @property
    def decoding(self) -> pd.DataFrame:
        """What decoding methods say of themselves, such as tokens accepted a pass: one row a setup that has one."""
        rows = [row for row in self.rows if row.decoding]
        return pd.DataFrame([dict(row.decoding) for row in rows], index=pd.Index([row.setup for row in rows], name="setup"))

    @property
    def settings(self) -> str:
        """The workload's settings in words, those that are switched off or not given left out."""
        given = [(name, value) for name, value in self.about["settings"].items() if value is not False and value is not None]
        return ", ".join(name if value is True else f"{name} {value}" for name, value in given)

    def pareto(self, x: str = "kv_physical_bytes", y: str = "score") -> go.Figure:
        """Quality against cost, one point a setup."""
        from workbench.plots.pareto import pareto

        return pareto(self, x, y)

    def report(self, path: str | Path) -> Path:
        """Writes one self-contained HTML file and returns its path."""
        from workbench.report import write_report

        return write_report(self, Path(path))

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: `about` and `rows`, without the traces."""
        return {"about": self.about, "rows": [asdict(row) for row in self.rows]}

    def save(self, path: str | Path) -> Path:
        """Writes `comparison.json` and the traces into a directory and returns it."""
        directory = Path(path)
        directory.mkdir(parents=True, exist_ok=True)
        if (directory / _FILE).exists():
            shutil.rmtree(directory / "traces", ignore_errors=True)
        names = {label: f"{number:02d}-{_file_name(label)}.trace" for number, label in enumerate(self.traces)}
        for label, trace in self.traces.items():
            trace.save(directory / "traces" / names[label])
        (directory / _FILE).write_text(json.dumps({**self.to_dict(), "traces": names}, indent=1))
        return directory

    @classmethod
    def load(cls, path: str | Path) -> Comparison:
        """Opens a directory `save` wrote. Raises UserError if it is none or damaged."""
        directory = Path(path)
        try:
            data = json.loads((directory / _FILE).read_text())
            rows = tuple(map(Row.from_dict, data["rows"]))
            names = data["traces"]
        except FileNotFoundError:
            raise UserError(f"{directory} holds no comparison; give the folder that `workbench compare --out` made.") from None
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{directory / _FILE} is damaged; run the comparison again.") from None
        traces = {label: Trace.load(directory / "traces" / name) for label, name in names.items()}
        return cls(data["about"], rows, traces)

    def __repr__(self) -> str:
        return f"Comparison({self.about['workload']} on {self.about['model']}, {len(self.rows)} setups)"

    def _repr_html_(self) -> str:
        from workbench.report import table_html

        return f"<p><b>{html.escape(repr(self))}</b></p>{table_html(self)}"


def _file_name(label: str) -> str:
    return "".join(c if c.isalnum() or c in "-_." else "-" for c in label).strip("-")
