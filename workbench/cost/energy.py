"""Energy of each phase, from the samples of the GPUs' own energy counters: measured, or null with the reason.

The counter moves in ticks, so a stretch of time is worth measuring only if it lasts many of them. Power is never
integrated: from Ampere on NVML's power is an average over the last second, and on some GPUs the sensor looks at a part of
the time only (Yang et al. 2023, arXiv 2312.02741).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from workbench.cost.durations import step_ns
from workbench.trace.schema import ENERGY_PERIOD_S, ENERGY_PERIODS, PHASES, TABLES

if TYPE_CHECKING:
    from workbench.trace.trace import Trace

_COLUMNS = [
    "phase",
    "device",
    "tokens",
    "seconds",
    "joules",
    "joules_error",
    "joules_per_token",
    "joules_reason",
    "mean_power_w",
    "power_reason",
    "counter_period_s",
]
_TICKS_TO_TELL = 4
"""A counter seen to move less often does not tell its period."""

Span = tuple[int, int]
"""Start and end in nanoseconds, on the clock of the trace."""


@dataclass(frozen=True)
class Energy:
    """Joules give or take an error, or None with the reason."""

    joules: float | None = None
    error: float | None = None
    reason: str | None = None


def phase_energy(trace: Trace) -> pd.DataFrame:
    """One row a phase and device. `joules` are what the whole GPU used, by its counter, give or take `joules_error`.

    `seconds` last from the first forward call of each stretch of the phase to the end of its last one. `mean_power_w` is
    the mean of the power samples in that time, a measurement of its own; from Ampere on each sample looks back a second.
    `counter_period_s` is how long a value of the counter stood. In a merged trace there is a `run` column.
    """
    steps, samples = trace.table("steps"), trace.table("device")
    if "run" not in steps:
        return _energy(steps, samples)
    runs = steps["run"].unique()
    parts = [_energy(steps[steps["run"] == run], samples[samples["run"] == run]).assign(run=run) for run in runs]
    return pd.concat(parts, ignore_index=True) if parts else _energy(steps, samples)


def phase_joules(trace: Trace) -> dict[str, tuple[float | None, str | None]]:
    """Joules of each phase over all devices, or None with the reason of the first device that lacks them."""
    joules = {}
    for phase, rows in phase_energy(trace).groupby("phase"):
        lacking = rows.loc[rows["joules"].isna(), "joules_reason"]
        joules[phase] = (None, lacking.iloc[0]) if len(lacking) else (float(rows["joules"].sum()), None)
    return joules


def counter_period_s(t_ns: np.ndarray, energy_mj: np.ndarray) -> float:
    """How long a value of the counter stands, as its samples saw it: the median time between those that saw it moved.

    Where they did not see it move often enough, it is the documented 0.1 s.
    """
    moved = t_ns[1:][np.diff(energy_mj) != 0]
    if len(moved) < _TICKS_TO_TELL:
        return ENERGY_PERIOD_S
    return float(np.median(np.diff(moved))) / 1e9


def stretches(steps: pd.DataFrame, phase: str, longest_pause_s: float) -> list[Span]:
    """The spans in which forward calls of a phase followed each other, by their numbers and with no longer pause."""
    spans: list[Span] = []
    last_step = -1
    of_phase = steps[steps["phase"] == phase].sort_values("start_ns")
    for step, start, duration in zip(of_phase["step"], of_phase["start_ns"], step_ns(of_phase), strict=True):
        if spans and step == last_step + 1 and start - spans[-1][1] <= longest_pause_s * 1e9:
            spans[-1] = (spans[-1][0], start + duration)
        else:
            spans.append((start, start + duration))
        last_step = step
    return spans


def counted_energy(spans: list[Span], t_ns: np.ndarray, energy_mj: np.ndarray, period_s: float) -> Energy:
    """The energy of some spans by samples of the counter, read on a straight line between two of them.

    A sample tells the energy of up to one period ago. So each span is known to a period's worth of its own power, or to
    that of the time to the nearest sample if that is longer, and half the time between samples on top, as power may
    change there.
    """
    shortest_s = ENERGY_PERIODS * period_s
    short_s = [(end - start) / 1e9 for start, end in spans if end - start < shortest_s * 1e9]
    if short_s:
        which = "it lasted" if len(spans) == 1 else f"{len(short_s)} of its {len(spans)} stretches are too short, one with"
        limit = f"less than {ENERGY_PERIODS} periods of the counter ({shortest_s:.3g} s)"
        return Energy(reason=f"{which} {min(short_s):.3g} s, {limit}")
    if (np.diff(energy_mj) < 0).any():
        return Energy(reason="the counter went backwards, as it does when the driver is loaded anew")
    t_s, joules = (t_ns - t_ns[0]) / 1e9, (energy_mj - energy_mj[0]) / 1000
    between_s = float(np.median(np.diff(t_s))) if len(t_s) > 1 else 0.0
    total = error = 0.0
    for span in spans:
        ends_s = (np.array(span) - t_ns[0]) / 1e9
        seconds = ends_s[1] - ends_s[0]
        nearest_s = max(float(np.abs(t_s - end).min()) for end in ends_s)
        if nearest_s * ENERGY_PERIODS > seconds:
            return Energy(reason=f"no sample was taken within {nearest_s:.3g} s of one of its ends")
        used = float(np.diff(np.interp(ends_s, t_s, joules))[0])
        total += used
        error += used / seconds * (max(period_s, nearest_s) + between_s / 2)
    return Energy(total, error)


def _energy(steps: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    if samples.empty:
        samples = pd.DataFrame({"reason": ["no device was sampled"]}).reindex(columns=TABLES["device"].names)
    rows = []
    for device, of_device in samples.groupby("device", dropna=False):
        name = device if isinstance(device, str) else None
        rows += [{"device": name, **row} for row in _device_rows(steps, of_device.sort_values("t_ns"))]
    return pd.DataFrame(rows, columns=_COLUMNS)


def _device_rows(steps: pd.DataFrame, samples: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of one device, one a phase that ran."""
    counted = samples.dropna(subset=["energy_mj"])
    t_ns, energy_mj = (counted[name].to_numpy(np.int64) for name in ("t_ns", "energy_mj"))
    period_s = counter_period_s(t_ns, energy_mj) if len(counted) else None
    has_power = bool(samples["power_mw"].notna().any())
    rows = []
    for phase in PHASES:
        spans = stretches(steps, phase, period_s or ENERGY_PERIOD_S)
        if not spans:
            continue
        tokens = int(steps.loc[steps["phase"] == phase, "tokens"].sum())
        energy = Energy(reason=_no_counter(samples, has_power))
        if period_s is not None:
            energy = counted_energy(spans, t_ns, energy_mj, period_s)
        power_w = _mean_power_w(spans, samples)
        no_power = "no sample fell into it" if has_power else _why(samples, "power_mw")
        rows.append(
            {
                "phase": phase,
                "tokens": tokens,
                "seconds": sum(end - start for start, end in spans) / 1e9,
                "joules": energy.joules,
                "joules_error": energy.error,
                "joules_per_token": None if energy.joules is None else energy.joules / tokens,
                "joules_reason": energy.reason,
                "mean_power_w": power_w,
                "power_reason": no_power if power_w is None else None,
                "counter_period_s": period_s,
            }
        )
    return rows


def _mean_power_w(spans: list[Span], samples: pd.DataFrame) -> float | None:
    inside = np.zeros(len(samples), dtype=bool)
    for start, end in spans:
        inside |= samples["t_ns"].between(start, end).to_numpy(bool)
    power_mw = samples.loc[inside, "power_mw"].mean()
    return None if pd.isna(power_mw) else float(power_mw) / 1000


def _no_counter(samples: pd.DataFrame, has_power: bool) -> str:
    why = _why(samples, "energy_mj")
    return f"no energy counter ({why}), which GPUs have from Volta on; power is not integrated instead" if has_power else why


def _why(samples: pd.DataFrame, column: str) -> str:
    """Why a device has no value in a column: the part of its `reason` that names the column, or all of it."""
    reasons = samples["reason"].dropna()
    for part in [] if reasons.empty else reasons.iloc[-1].split("; "):
        columns, _, why = part.partition(": ")
        if column in columns.split(", "):
            return why
    return "not recorded" if reasons.empty else reasons.iloc[-1]
