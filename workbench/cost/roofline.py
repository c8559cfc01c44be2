"""Predicted seconds by roofline (Williams, Waterman and Patterson 2009, doi:10.1145/1498765.1498785), and what fits.

In each layer and step a component takes `max(FLOPs / peak, bytes / bandwidth)`, with FLOPs of the pairs the mask lets through
and the bytes of fused kernels. On a vendor's sheet that is a bound no run can beat, not an expectation. On a machine that was
calibrated, the seconds are those of eager PyTorch at its measured rates (`workbench.cost.eager`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.cost.bytes import bytes_rows, linear_bytes
from workbench.cost.eager import eager_rows
from workbench.cost.flops import COMPONENTS, flops_rows
from workbench.cost.hardware import ELEMENT_BYTES, TORCH_DTYPES, Hardware
from workbench.cost.hardware import hardware as sheet
from workbench.cost.plan import MAX_STEPS, Plan
from workbench.cost.under_method import Says, under
from workbench.errors import UserError
from workbench.trace.anatomy import Anatomy
from workbench.trace.schema import PHASES, TABLES
from workbench.trace.trace import Trace

_KEYS = ["step", "layer", "component"]
_SUMS = ["flops", "bytes", "compute_s", "memory_s", "predicted_s"]
_EXTRA_COMPONENTS = ("elementwise", "overhead")
"""What eager PyTorch does beside the components: activations, rotary positions, residual sums; Python and dispatch."""


@dataclass(frozen=True)
class Memory:
    """What has to lie in memory, modelled: weights and KV cache. Activations and the runtime need more."""

    weights_bytes: int
    kv_bytes: int
    memory_bytes: int

    @property
    def needed_bytes(self) -> int:
        """Weights and KV cache."""
        return self.weights_bytes + self.kv_bytes

    @property
    def fits(self) -> bool:
        """Whether one device holds it."""
        return self.needed_bytes <= self.memory_bytes

    @property
    def devices(self) -> int:
        """Devices whose memory together holds it. How they would share the work is not modelled."""
        return math.ceil(self.needed_bytes / self.memory_bytes)


@dataclass(frozen=True)
class Prediction:
    """What a run would take on a device. Every number in it is predicted; none is measured."""

    model: str
    hardware: Hardware
    dtype: str
    shape: dict[str, Any]
    table: pd.DataFrame
    """One row a phase and component: `flops, bytes, compute_s, memory_s, predicted_s, bound, intensity`."""
    phases: pd.DataFrame
    """One row a phase: `steps, tokens`, the same sums and `predicted_step_s`."""
    memory: Memory
    notes: tuple[str, ...]

    @property
    def predicted_s(self) -> float:
        """Seconds in all."""
        return float(self.table["predicted_s"].sum())

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        memory = {**vars(self.memory), "fits": self.memory.fits, "devices": self.memory.devices}
        return {
            "model": self.model,
            "hardware": self.hardware.name,
            "sources": list(self.hardware.sources),
            "dtype": self.dtype,
            **self.shape,
            "predicted_s": self.predicted_s,
            "phases": _records(self.phases),
            "components": _records(self.table),
            "memory": memory,
            "notes": list(self.notes),
        }

    def __repr__(self) -> str:
        parts = ", ".join(f"{row.phase} {row.predicted_s:.4g} s" for row in self.phases.itertuples())
        return f"Prediction({self.model} on {self.hardware.name} in {self.dtype}: {parts})"

    def _repr_html_(self) -> str:
        return f"<p><b>{self!r}</b> (predicted)</p>" + self.table.to_html(index=False)


def predict(
    source: Trace | Anatomy,
    hardware: str | Path | Hardware,
    *,
    dtype: str | None = None,
    batch: int | None = None,
    context: int | None = None,
    new_tokens: int | None = None,
    method: Says | None = None,
) -> Prediction:
    """Predicts the seconds of a recorded run, or of one that has not happened, on a device.

    Args:
        source: a trace, whose counts are taken as they are; or an anatomy (`wb.anatomy`), for which a prompt is read and
            decoded with a dense cache.
        hardware: a sheet: a name (`wb.hardware`), a JSON file, or `this-machine` once it is calibrated.
        dtype: `fp32, tf32, bf16, fp16, fp8` or `int8`: of weights, activations and KV cache. None is the model's own.
        batch: rows, for an anatomy; 1 if not given.
        context: prompt tokens a row, for an anatomy; 1024 if not given.
        new_tokens: decode steps, for an anatomy; 128 if not given.
        method: what a cache method says of such a run, for an anatomy (`workbench.experiments.planned`); None is dense.

    Raises:
        UserError: for a sheet, dtype or size that does not exist, and for sizes beside a trace, which has its own.
    """
    device = sheet(hardware)
    if isinstance(source, Trace):
        if not batch is context is new_tokens is method is None:
            raise UserError("A trace has its own batch, context, new tokens and method; leave them out, or give an anatomy.")
        chosen = dtype_of(source.anatomy, device, dtype)
        trace = _retyped(source, chosen)
        return _predict(trace, device, chosen, _routed(trace), None, {}, [])
    shape = {"batch": _or(batch, 1), "context": _or(context, 1024), "new_tokens": _or(new_tokens, 128)}
    chosen = dtype_of(source, device, dtype)
    plan = Plan(replace(source, dtype=chosen, element_bytes=ELEMENT_BYTES[chosen]), **shape)
    trace, repeats = plan.trace()
    if method is not None:
        trace = under(trace, method(plan.anatomy, plan.context, trace.table("steps")["context"].tolist()[1:]))
    return _predict(trace, device, chosen, plan.experts(trace), repeats, shape, _plan_notes(plan))


def predicted_steps(trace: Trace, hardware: str | Path | Hardware) -> pd.Series:
    """Predicted seconds of each step of a recorded trace, by step."""
    device = sheet(hardware)
    dtype = dtype_of(trace.anatomy, device, None)
    return _rows(_retyped(trace, dtype), device, dtype, _routed(trace)).groupby("step")["predicted_s"].sum()


def layer_seconds(trace: Trace, device: Hardware, dtype: str, experts: pd.DataFrame) -> pd.DataFrame:
    """Predicted seconds of a planned trace, one row a step, layer (-1: outside the layers) and component."""
    return _rows(trace, device, dtype, experts)[[*_KEYS, "predicted_s"]]


def _predict(trace, device, dtype, experts, repeats, shape, notes) -> Prediction:
    steps = trace.table("steps").set_index("step")
    rows = _rows(trace, device, dtype, experts)
    counted = pd.Series(1, index=steps.index) if repeats is None else repeats
    rows[_SUMS] = rows[_SUMS].mul(rows["step"].map(counted), axis=0)
    rows["phase"] = rows["step"].map(steps["phase"])
    phases = [phase for phase in PHASES if (steps["phase"] == phase).any()]
    table = rows.groupby(["phase", "component"], as_index=False)[_SUMS].sum()
    order = {name: place for place, name in enumerate([*COMPONENTS, *_EXTRA_COMPONENTS])}
    places = [table["phase"].map(phases.index), table["component"].map(order)]
    table = table.iloc[np.lexsort(places[::-1])].reset_index(drop=True)
    table = table[(table["flops"] > 0) | (table["bytes"] > 0) | (table["predicted_s"] > 0)].reset_index(drop=True)
    memory = _memory(trace)
    return Prediction(
        trace.anatomy.class_name,
        device,
        dtype,
        shape,
        _bounded(table),
        _phases(table, steps, counted, phases),
        Memory(*memory, device.memory_bytes),
        (*notes, *_notes(trace, device, dtype)),
    )


def _rows(trace: Trace, device: Hardware, dtype: str, experts: pd.DataFrame) -> pd.DataFrame:
    """One row a step, layer and component with all of `_SUMS`."""
    flops = flops_rows(trace, "causal").astype({"flops": float})
    moved = bytes_rows(trace, "fused", device.on_chip_bytes).astype({"bytes": float})
    flops, moved = flops[flops["component"] != "experts"], moved[moved["component"] != "experts"]
    parts = [frame.groupby(_KEYS)[name].sum() for frame, name in ((flops, "flops"), (moved, "bytes"))]
    rows = pd.concat([pd.concat(parts, axis=1).reset_index(), *_expert_rows(trace.anatomy, experts)], ignore_index=True)
    rows[["flops", "bytes"]] = rows[["flops", "bytes"]].fillna(0.0)
    rows["compute_s"] = rows["flops"] / device.peak(dtype)
    rows["memory_s"] = rows["bytes"] / device.bandwidth
    if dtype not in device.rates:
        return rows.assign(predicted_s=rows[["compute_s", "memory_s"]].max(axis=1))
    seconds = eager_rows(trace, device.rates[dtype], experts).groupby(_KEYS)["predicted_s"].sum()
    joined = rows.set_index(_KEYS).join(seconds, how="outer").reset_index()
    counted = joined[["compute_s", "memory_s"]].fillna(0.0)
    # what a method adds, and modules the anatomy cannot place, have no measured rate: they stay at the bound
    predicted = joined["predicted_s"].where(joined["predicted_s"].notna(), counted.max(axis=1))
    return joined.fillna({name: 0.0 for name in _SUMS}).assign(predicted_s=predicted)


def _expert_rows(anatomy: Anatomy, experts: pd.DataFrame) -> list[pd.DataFrame]:
    """FLOPs of every token sent, and bytes of every expert hit once a step, with the activations of its tokens."""
    parts = []
    for layer in anatomy.layers:
        chosen = experts[experts["layer"] == layer.index]
        if layer.experts is None or chosen.empty:
            continue
        flops = sum(2.0 * chosen["tokens"] * each.in_features * each.out_features for each in layer.experts.linears)
        weights = sum(linear_bytes(0, each, anatomy.element_bytes) for each in layer.experts.linears)
        a_token = sum(linear_bytes(1, each, anatomy.element_bytes) for each in layer.experts.linears) - weights
        moved = weights * chosen["hit"] + a_token * chosen["tokens"]
        parts.append(
            pd.DataFrame({"step": chosen["step"], "layer": layer.index, "component": "experts", "flops": flops, "bytes": moved})
        )
    return parts


def _routed(trace: Trace) -> pd.DataFrame:
    """Tokens sent to experts and experts hit, as the trace recorded them."""
    routing = trace.table("routing").query("tokens > 0")
    return routing.groupby(["step", "layer"], as_index=False).agg(tokens=("tokens", "sum"), hit=("expert", "count"))


def _bounded(table: pd.DataFrame) -> pd.DataFrame:
    """The table with what binds each row, and its FLOPs a byte; null where nothing moves."""
    bound = np.where(table["compute_s"] > table["memory_s"], "compute", "memory")
    extra = table["component"].isin(_EXTRA_COMPONENTS)
    intensity = table["flops"] / table["bytes"].where(table["bytes"] > 0)
    return table.assign(bound=np.where(extra, "framework", bound), intensity=intensity)


def _phases(table: pd.DataFrame, steps: pd.DataFrame, counted: pd.Series, phases: list[str]) -> pd.DataFrame:
    sums = table.groupby("phase")[_SUMS].sum()
    rows = []
    for phase in phases:
        of_phase = steps["phase"] == phase
        count = int(counted[of_phase].sum())
        tokens = int((steps["tokens"] * counted)[of_phase].sum())
        total = sums.loc[phase]
        rows.append(
            {"phase": phase, "steps": count, "tokens": tokens, **total, "predicted_step_s": total["predicted_s"] / count}
        )
    return pd.DataFrame(rows)


def _memory(trace: Trace) -> tuple[int, int]:
    """Bytes of the weights, and of the KV cache where it was fullest."""
    anatomy, attention = trace.anatomy, trace.table("attention")
    held = (attention["batch"] * attention["kv_held"]).groupby(attention["layer"]).max()
    elements = sum(held.get(layer.index, 0) * layer.attention.cached_elements for layer in anatomy.layers)
    return anatomy.num_parameters * anatomy.element_bytes, int(elements) * anatomy.element_bytes


def dtype_of(anatomy: Anatomy, device: Hardware, dtype: str | None) -> str:
    """The dtype to predict in. Raises UserError if there is none of that name, or the sheet has no peak for it."""
    chosen = dtype or TORCH_DTYPES.get(anatomy.dtype, anatomy.dtype)
    if chosen not in ELEMENT_BYTES:
        raise UserError(f"There is no dtype {chosen!r}; choose one of {', '.join(ELEMENT_BYTES)}.")
    device.peak(chosen)
    return chosen


def _retyped(trace: Trace, dtype: str) -> Trace:
    """The trace as if everything had been stored in another dtype; what a method moved scales with it."""
    anatomy = trace.anatomy
    size = ELEMENT_BYTES[dtype]
    tables = {name: trace.arrow(name) for name in TABLES}
    if size != anatomy.element_bytes:
        cache = tables["cache"]
        moved = [None if each is None else each * size // anatomy.element_bytes for each in cache["extra_bytes"].to_pylist()]
        place = cache.schema.get_field_index("extra_bytes")
        tables["cache"] = cache.set_column(place, cache.schema.field(place), [moved])
    return Trace({**trace.meta, "anatomy": replace(anatomy, dtype=dtype, element_bytes=size).to_dict()}, tables)


def _plan_notes(plan: Plan) -> list[str]:
    notes = []
    limit = plan.anatomy.max_positions
    if limit is not None and plan.context + plan.new_tokens > limit:
        notes.append(f"The model's own context is {limit} tokens; it was not trained for more.")
    if any(layer.experts is not None for layer in plan.anatomy.layers):
        notes.append("Experts hit are expected values under independent routing; real routers hit fewer.")
    if plan.new_tokens > MAX_STEPS:
        notes.append(f"{plan.new_tokens} decode steps are stood in for by {MAX_STEPS} in the middle of as many stretches.")
    return notes


def _notes(trace: Trace, device: Hardware, dtype: str) -> list[str]:
    notes = []
    if dtype in device.rates:
        notes.append("Seconds are those of eager PyTorch at this machine's measured rates.")
    else:
        notes.append("Seconds are a roofline bound with fused kernels: no run can be faster, and real ones are slower.")
    if dtype in {"fp8", "int8"}:
        notes.append(f"Weights, activations and KV cache are all taken as {dtype}.")
    if device.note:
        notes.append(f"{device.label}: {device.note}")
    if trace.arrow("unattributed").num_rows:
        notes.append("Modules the anatomy cannot place count with their FLOPs, and without their bytes.")
    return notes


def _or(value: int | None, default: int) -> int:
    return default if value is None else value


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """Rows with null in place of NaN."""
    return frame.astype(object).where(frame.notna(), None).to_dict("records")
