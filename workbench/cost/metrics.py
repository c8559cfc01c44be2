"""Metrics of a run, from its trace: time to first token, time per output token, cache bytes, what fired."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.cost.durations import step_ns
from workbench.cost.energy import phase_joules
from workbench.trace.schema import PHASES, REHEARSAL

if TYPE_CHECKING:
    from workbench.trace.trace import Trace


BEFORE_FIRST_TOKEN = ("prefill", REHEARSAL)
"""The phases that come before the first token."""


def ttft_ns(trace: Trace) -> int | None:
    """Time to first token: the duration of the prefill, and of the rehearsal a method may add before it decides."""
    steps = trace.table("steps")
    prefill = step_ns(steps[steps["phase"].isin(BEFORE_FIRST_TOKEN)])
    return int(prefill.sum()) if len(prefill) else None


def tpot_ns(trace: Trace) -> int | None:
    """Time per output token: the median duration of a decode step."""
    steps = trace.table("steps")
    decode = step_ns(steps[steps["phase"] == "decode"])
    return int(decode.median()) if len(decode) else None


def found_token_ns(trace: Trace) -> float | None:
    """Time per output token under a decoding method: steps that look for tokens, over the tokens found; None without one."""
    found = (trace.meta.get("decoding") or {}).get("tokens")
    if not found:
        return None
    steps = trace.table("steps")
    return float(step_ns(steps[~steps["phase"].isin((*BEFORE_FIRST_TOKEN, "append"))]).sum() / found)


def cache_bytes(trace: Trace) -> pd.DataFrame:
    """Physical and nominal cache bytes after each step, summed over layers: `step, physical_bytes, nominal_bytes`."""
    cache = trace.table("cache")
    last = cache.groupby(["step", "layer"], as_index=False)[["physical_bytes", "nominal_bytes"]].last()
    return last.groupby("step", as_index=False)[["physical_bytes", "nominal_bytes"]].sum()


def phase_summary(trace: Trace) -> pd.DataFrame:
    """One row a phase: steps, tokens, measured seconds, modelled FLOPs and fused bytes, cache bytes at the phase's end.

    Joules are measured, of all sampled GPUs together, or null with the reason; `trace.energy()` has them by device.
    """
    steps = trace.table("steps")
    flops = trace.flops(by="phase").set_index("phase")["flops"]
    moved = trace.bytes(by="phase").set_index("phase")["bytes"]
    held = cache_bytes(trace).merge(steps[["step", "phase"]], on="step").groupby("phase").last()
    energy = phase_joules(trace)
    rows = []
    for phase in PHASES:
        of_phase = steps[steps["phase"] == phase]
        if of_phase.empty:
            continue
        joules, joules_reason = energy[phase]
        rows.append(
            {
                "phase": phase,
                "steps": len(of_phase),
                "tokens": int(of_phase["tokens"].sum()),
                "seconds": float(step_ns(of_phase).sum()) / 1e9,
                "flops": int(flops.get(phase, 0)),
                "bytes": int(moved.get(phase, 0)),
                "kv_physical_bytes": int(held["physical_bytes"].get(phase, 0)),
                "kv_nominal_bytes": int(held["nominal_bytes"].get(phase, 0)),
                "joules": joules,
                "joules_reason": joules_reason,
            }
        )
    return pd.DataFrame(rows)


def mass_by_position(row: Any) -> np.ndarray:
    """The mass of one row of the importance table by position, `[length]` from position `start` on.

    Where the row is pooled, the sum over a stretch is spread evenly over the positions that are not listed by themselves.
    """
    mass = np.asarray(row.mass, dtype=float)
    if row.top_positions is None:
        return mass
    width = -(-row.length // len(mass))
    top = np.asarray(row.top_positions) - row.start
    pooled = np.ones(row.length, dtype=bool)
    pooled[top] = False
    stretch = np.arange(row.length) // width
    sharing = np.bincount(stretch, weights=pooled, minlength=len(mass))
    spread = np.where(pooled, (mass / np.maximum(sharing, 1))[stretch], 0.0)
    spread[top] = row.top_mass
    return spread


@dataclass(frozen=True)
class Fired:
    """What a method did: the layers and steps where it acted, of those where it had to."""

    layers: int
    due_layers: int
    steps: int
    due_steps: int

    def __str__(self) -> str:
        if self.due_steps == 0:
            return "nothing to do"
        return f"fired on {self.layers}/{self.due_layers} layers, {self.steps}/{self.due_steps} steps"


def fired(trace: Trace, must_evict: list[int]) -> Fired:
    """Counts the layers and steps where a method did what it had to, and those where it had to.

    It has to evict where a layer held more than its budget when it was the method's turn to decide: the engine writes a `due`
    row there, and it must on the layers given. The method did if an `evict` row follows and what is held then, over rows
    and kv heads, is no more than the layer's budget allows. It has to select where a layer held more than a decode step may
    read: the engine writes a `select` row. The method did if the layer's attention read fewer slots than it held.
    """
    cache = trace.table("cache")
    to_evict, to_select = cache[cache["op"] == "due"], cache[cache["op"] == "select"]
    if to_evict.empty and to_select.empty:
        return Fired(0, len(must_evict), 0, 0)
    anatomy = trace.anatomy
    a_token = {
        layer.index: (layer.attention.head_dim + layer.attention.value_dim) * anatomy.element_bytes for layer in anatomy.layers
    }
    evicted = cache[cache["op"] == "evict"]
    evicted = evicted[evicted["held_tokens"] * evicted["layer"].map(a_token) <= evicted["nominal_bytes"]]
    attention = trace.table("attention")
    selected = attention[attention["kv_read"] < attention["kv_held"]]
    done = _places(evicted) & _places(to_evict) | {(*place, "read") for place in _places(selected) & _places(to_select)}
    due = _places(to_evict) | {(*place, "read") for place in _places(to_select)}
    steps = {step for step, *_ in due}
    missed = {step for step, *_ in due - done}
    due_layers = {*must_evict, *(layer for _, layer, *_ in due)}
    return Fired(len({layer for _, layer, *_ in done}), len(due_layers), len(steps - missed), len(steps))


def _places(rows: pd.DataFrame) -> set[tuple[int, int]]:
    """The steps and layers of some rows."""
    return set(zip(rows["step"].tolist(), rows["layer"].tolist(), strict=True))


def rerouted(trace: Trace) -> Fired:
    """Counts the layers and steps where a routing method computed something else than the model would have, of those it saw."""
    work = trace.table("work")
    changed = work[work["changed"] > 0]
    return Fired(changed["layer"].nunique(), work["layer"].nunique(), changed["step"].nunique(), work["step"].nunique())
