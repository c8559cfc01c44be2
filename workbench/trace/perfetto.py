"""A trace as Chrome/Perfetto JSON: slices for forward calls and spans, and counter tracks.

The tracks are cache bytes, FLOPs, expert load, and for each sampled GPU its power, memory and utilisation.

Format: the trace event format, which chrome://tracing and ui.perfetto.dev open; times are microseconds.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.errors import UserError
from workbench.trace.trace import Trace

_DEVICE_TRACKS = {
    "power": ("power_mw",),
    "memory": ("used_bytes", "allocated_bytes", "reserved_bytes"),
    "utilisation": ("util_percent", "memory_util_percent"),
}
_DEVICE_COLUMNS = [column for columns in _DEVICE_TRACKS.values() for column in columns]


def write_perfetto(trace: Trace, path: Path) -> Path:
    """Writes the JSON file and returns its path. Raises UserError if it cannot be written."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps({"traceEvents": events(trace), "displayTimeUnit": "ms", "otherData": about(trace)}))
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write {path} ({error.strerror}); choose another path.") from None
    return path


def about(trace: Trace) -> dict[str, str]:
    """What the trace is of, as text."""
    return {"model": trace.anatomy.class_name, "setup": trace.setup, "complete": str(trace.complete)}


def events(trace: Trace) -> list[dict[str, Any]]:
    """The events, in order of time."""
    steps = trace.table("steps")
    if steps.empty:
        return []
    samples = trace.table("device").dropna(subset=_DEVICE_COLUMNS, how="all")
    origin_ns = int(pd.concat([steps["start_ns"], samples["t_ns"]]).min())
    ends = {row.step: (row.start_ns + row.duration_ns - origin_ns) / 1000 for row in steps.itertuples()}
    slices = [
        {
            "name": row.phase,
            "ph": "X",
            "ts": (row.start_ns - origin_ns) / 1000,
            "dur": row.duration_ns / 1000,
            "pid": 0,
            "tid": 0,
            "args": {"step": row.step, "tokens": row.tokens, "context": row.context},
        }
        for row in steps.itertuples()
    ]
    for row in trace.table("spans").itertuples():
        slices.append(
            {
                "name": row.name if row.layer < 0 else f"{row.name} {row.layer}",
                "ph": "X",
                "ts": (row.start_ns - origin_ns) / 1000,
                "dur": row.duration_ns / 1000,
                "pid": 0,
                "tid": 0,
                "args": {"step": row.step, "device_ns": None if pd.isna(row.device_ns) else int(row.device_ns)},
            }
        )
    counters = []
    held = trace.table("cache").groupby(["step", "layer"]).last().groupby("step")[["physical_bytes", "nominal_bytes"]].sum()
    for step, row in held.iterrows():
        counters.append(_counter("KV bytes", ends[step], {"physical": int(row.iloc[0]), "nominal": int(row.iloc[1])}))
    for row in trace.flops(by="step").itertuples():
        counters.append(_counter("FLOPs", ends[row.step], {"flops": int(row.flops)}))
    for (step, layer), rows in trace.table("routing").groupby(["step", "layer"]):
        load = {f"expert {expert}": int(tokens) for expert, tokens in zip(rows["expert"], rows["tokens"], strict=True)}
        counters.append(_counter(f"expert load, layer {layer}", ends[step], load))
    for sample in samples.to_dict("records"):
        for track, columns in _DEVICE_TRACKS.items():
            values = {name: int(sample[name]) for name in columns if pd.notna(sample[name])}
            if values:
                counters.append(_counter(f"{sample['device']} {track}", (sample["t_ns"] - origin_ns) / 1000, values))
    return sorted([*slices, *counters], key=lambda event: event["ts"])


def _counter(name: str, at_us: float, values: dict[str, int]) -> dict[str, Any]:
    return {"name": name, "ph": "C", "ts": at_us, "pid": 0, "args": values}
