"""Energy of a phase from samples of a counter: by hand where it can be told, null with the reason where it cannot."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch

import workbench as wb
from workbench.cost.energy import counted_energy, counter_period_s, stretches
from workbench.testing import ids, random_llama
from workbench.trace.schema import TABLES
from workbench.trace.store import to_arrow

S = 1_000_000_000
WATTS = 300


def samples(seconds: float, every_s: float, tick_s: float) -> tuple[np.ndarray, np.ndarray]:
    """Times and readings of a counter that draws 300 W and moves every `tick_s`."""
    t_s = np.arange(0, seconds + every_s / 2, every_s)
    return (t_s * S).astype(np.int64), (np.floor(t_s / tick_s + 1e-9) * tick_s * WATTS * 1000).astype(np.int64)


@pytest.mark.parametrize(
    ("every_s", "tick_s", "seen_s"), [(0.01, 0.05, 0.05), (0.1, 0.1, 0.1), (0.01, 0.01, 0.01), (0.5, 0.1, 0.5)]
)
def test_the_period_is_the_time_between_samples_that_saw_the_counter_move(every_s, tick_s, seen_s):
    assert counter_period_s(*samples(10, every_s, tick_s)) == pytest.approx(seen_s)


def test_the_period_is_the_documented_one_where_it_cannot_be_told():
    assert counter_period_s(*samples(0.15, 0.01, 0.05)) == 0.1  # three ticks
    assert counter_period_s(np.array([0, S]), np.array([5, 5])) == 0.1


def test_a_long_stretch_is_the_rate_times_the_time():
    t_ns, energy_mj = samples(10, 0.01, 0.05)
    energy = counted_energy([(2 * S, 5 * S)], t_ns, energy_mj, 0.05)
    assert energy.reason is None
    assert energy.error == pytest.approx(WATTS * (0.05 + 0.01 / 2), rel=0.02)
    assert abs(energy.joules - 3 * WATTS) <= energy.error


def test_errors_of_several_stretches_add_up():
    t_ns, energy_mj = samples(10, 0.01, 0.05)
    one, two = counted_energy([(S, 2 * S)], t_ns, energy_mj, 0.05), counted_energy([(3 * S, 4 * S)], t_ns, energy_mj, 0.05)
    both = counted_energy([(S, 2 * S), (3 * S, 4 * S)], t_ns, energy_mj, 0.05)
    assert both.joules == pytest.approx(one.joules + two.joules) and both.error == pytest.approx(one.error + two.error)


def test_the_error_holds_wherever_a_stretch_lies_and_whatever_the_power_around_it():
    """Idle at 0 W, then 300 W for a second, then idle; read through a tick of 0.05 s and samples every 0.03 s."""
    t_s = np.arange(0, 4, 0.03)
    for start_s in np.arange(1, 1.2, 0.007):
        read_s = np.floor(t_s / 0.05) * 0.05
        energy_mj = (np.clip(read_s - start_s, 0, 1) * WATTS * 1000).astype(np.int64)
        span = (int(start_s * S), int((start_s + 1) * S))
        energy = counted_energy([span], (t_s * S).astype(np.int64), energy_mj, 0.05)
        assert abs(energy.joules - WATTS) <= energy.error < WATTS / 10


def test_what_cannot_be_told_says_why():
    t_ns, energy_mj = samples(10, 0.01, 0.05)
    short = counted_energy([(S, S + S // 5)], t_ns, energy_mj, 0.05)
    assert short.joules is None and short.reason == "it lasted 0.2 s, less than 10 periods of the counter (0.5 s)"
    some = counted_energy([(S, 2 * S), (3 * S, 3 * S + S // 5)], t_ns, energy_mj, 0.05)
    assert some.reason.startswith("1 of its 2 stretches are too short, one with 0.2 s")
    late = counted_energy([(9 * S, 12 * S)], t_ns, energy_mj, 0.05)
    assert late.joules is None and late.reason == "no sample was taken within 2 s of one of its ends"
    anew = counted_energy([(S, 3 * S)], t_ns, energy_mj % 1_000_000, 0.05)
    assert anew.joules is None and "went backwards" in anew.reason


def test_stretches_end_where_another_phase_or_a_pause_begins():
    rows = [("prefill", 0, 10), ("decode", 10, 5), ("decode", 17, 5), ("append", 30, 5), ("decode", 36, 4), ("decode", 99, 1)]
    steps = pd.DataFrame(rows, columns=["phase", "start_ns", "duration_ns"]).reset_index(names="step").assign(device_ns=None)
    assert stretches(steps, "decode", longest_pause_s=3e-9) == [(10, 22), (36, 40), (99, 100)]
    assert stretches(steps, "prefill", 1) == [(0, 10)] and stretches(steps, "append", 1) == [(30, 35)]
    assert stretches(steps.query("phase == 'decode'"), "decode", 1) == [(10, 22), (36, 100)]  # as of a selected phase


@pytest.fixture(scope="module")
def recorded() -> wb.Trace:
    with wb.profile(random_llama()) as prof, torch.no_grad():
        prof.model.generate(ids(5), max_new_tokens=3, do_sample=False)
    return prof.trace


def with_samples(trace: wb.Trace, rows: list[dict]) -> wb.Trace:
    """The trace with its steps spread over 10 s, 4 s of them decoding, and other samples."""
    steps = trace.table("steps").assign(start_ns=[S, 4 * S, 6 * S], duration_ns=[3 * S, 2 * S, 2 * S])
    names = TABLES["device"].names
    tables = {name: trace.arrow(name) for name in TABLES}
    tables["steps"] = pa.Table.from_pandas(steps, TABLES["steps"], preserve_index=False)
    tables["device"] = to_arrow("device", [tuple(row.get(name) for name in names) for row in rows])
    return wb.Trace(trace.meta, tables)


def counter_rows(device: str, factor: int = 1, **columns) -> list[dict]:
    t_ns, energy_mj = samples(10, 0.02, 0.1)
    return [
        {"device": device, "t_ns": int(t), "energy_mj": factor * int(e), "power_mw": factor * WATTS * 1000, **columns}
        for t, e in zip(t_ns, energy_mj, strict=True)
    ]


def test_a_row_a_phase_and_device_and_their_sum_in_the_summary(recorded):
    trace = with_samples(recorded, counter_rows("cuda:0") + counter_rows("cuda:1", 2))
    table = trace.energy().set_index(["phase", "device"])
    assert len(table) == 4
    for (phase, device), row in table.iterrows():
        watts, seconds = WATTS * (1 + (device == "cuda:1")), {"prefill": 3, "decode": 4}[phase]
        assert row["seconds"] == seconds and row["counter_period_s"] == pytest.approx(0.1)
        assert abs(row["joules"] - watts * seconds) <= row["joules_error"] == pytest.approx(watts * 0.11, rel=0.05)
        assert row["joules_per_token"] == row["joules"] / {"prefill": 5, "decode": 2}[phase]
        assert row["mean_power_w"] == watts and row["joules_reason"] is None and row["power_reason"] is None
    summary = trace.summary().set_index("phase")
    for phase in ("prefill", "decode"):
        assert summary.loc[phase, "joules"] == table.loc[phase, "joules"].sum()


def test_power_alone_is_not_integrated(recorded):
    rows = counter_rows("cuda:0", reason="energy_mj: Not Supported; used_bytes: Not Supported")
    table = with_samples(recorded, [{**row, "energy_mj": None} for row in rows]).energy()
    assert table["joules"].isna().all() and (table["mean_power_w"] == WATTS).all()
    assert (table["joules_reason"].str.startswith("no energy counter (Not Supported), which GPUs have from Volta on")).all()


def test_one_device_without_a_counter_makes_the_sum_null(recorded):
    lacking = {"t_ns": S, "device": "cuda:1", "reason": "NVML does not open cuda:1: GPU is lost"}
    summary = with_samples(recorded, [*counter_rows("cuda:0"), lacking]).summary()
    assert summary["joules"].isna().all()
    assert set(summary["joules_reason"]) == {lacking["reason"]}


def test_a_trace_without_samples_says_so(recorded):
    table = with_samples(recorded, []).energy()
    assert set(table["joules_reason"]) == set(table["power_reason"]) == {"no device was sampled"}


def test_merged_runs_keep_their_own_clocks(recorded):
    one, two = with_samples(recorded, counter_rows("cuda:0")), with_samples(recorded, counter_rows("cuda:0", 2))
    merged = wb.Trace.merge({"one": one, "two": two}).energy()
    for run, trace in (("one", one), ("two", two)):
        alone = trace.energy()
        assert merged[merged["run"] == run]["joules"].tolist() == alone["joules"].tolist()
