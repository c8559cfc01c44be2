"""Predicted beside measured: what a run on this machine took, and what its calibrated sheet says it should have."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from workbench.cost.hardware import THIS_MACHINE, Hardware
from workbench.cost.hardware import hardware as sheet_of
from workbench.cost.roofline import predicted_steps
from workbench.errors import UserError
from workbench.trace.schema import PHASES
from workbench.trace.trace import Trace


def beside_measured(trace: Trace, hardware: str | Path | Hardware = THIS_MACHINE) -> pd.DataFrame:
    """One row a phase: its median step measured, with the shortest and the longest, and predicted, with the error.

    Columns: `phase, steps, measured_s, measured_low_s, measured_high_s, predicted_s, error_percent`; an error above zero is a
    prediction that is too slow.

    Raises:
        UserError: for a sheet that was not measured or of another machine, and for a trace without times.
    """
    sheet = sheet_of(hardware)
    if not sheet.rates:
        raise UserError(
            f"{sheet.label} was not measured, so its bound is no match for a measured time; use {THIS_MACHINE!r} "
            "after `workbench doctor --calibrate`."
        )
    ran_on, measured_on = (_machine(where) for where in (trace.meta.get("environment", {}), sheet.environment))
    if ran_on != measured_on:
        raise UserError(f"The trace was recorded on {ran_on}, and the sheet measured on {measured_on}; calibrate there.")
    steps = trace.table("steps").set_index("step")
    if steps["duration_ns"].isna().all():
        raise UserError("The trace holds no measured times; record one with `workbench profile`.")
    predicted = predicted_steps(trace, sheet)
    rows = []
    for phase in PHASES:
        measured = steps.loc[steps["phase"] == phase, "duration_ns"] / 1e9
        if measured.empty:
            continue
        of_phase = float(predicted[measured.index].median())
        rows.append(
            {
                "phase": phase,
                "steps": len(measured),
                "measured_s": measured.median(),
                "measured_low_s": measured.min(),
                "measured_high_s": measured.max(),
                "predicted_s": of_phase,
                "error_percent": 100 * (of_phase / measured.median() - 1),
            }
        )
    return pd.DataFrame(rows)


def _machine(environment: Mapping[str, Any]) -> str:
    devices = environment.get("cuda_devices") or []
    return ", ".join([str(environment.get("processor")), f"{environment.get('threads')} threads", *devices])
