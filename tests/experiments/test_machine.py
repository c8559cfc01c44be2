"""Measuring runs through on this machine and leaves a sheet that predicts. How fast the machine is, is not asked."""

from __future__ import annotations

import json

import pytest

import workbench as wb
from workbench.cost.rates import ATTENTION, PASSES
from workbench.experiments.machine import QUICK, measure_machine, store
from workbench.testing import random_llama


@pytest.fixture(scope="module")
def sheet():
    seen = []
    found = measure_machine(QUICK, device="cpu", on_progress=lambda *progress: seen.append(progress))
    assert {name for name, *_ in seen} == set(found.rates)
    for name in found.rates:
        steps = [progress[1:] for progress in seen if progress[0] == name]
        assert [done for done, _ in steps] == list(range(1, steps[-1][1] + 1)) and len({total for _, total in steps}) == 1
    return found


def test_every_rate_is_there(sheet):
    assert "fp32" in sheet.rates and set(sheet.peak_flops) == set(sheet.rates)
    for dtype, rates in sheet.rates.items():
        assert set(rates.passes) == set(PASSES) and set(rates.attention) == set(ATTENTION)
        for grid in (rates.products, rates.reads, rates.slowdown, *rates.passes.values(), *rates.attention.values()):
            size = 1
            for axis in grid.axes:
                assert list(axis) == sorted(axis)
                size *= len(axis)
            assert len(grid.rates) == size and min(grid.rates) > 0
        assert rates.step_s >= 0 and rates.layer_s >= 0
        assert sheet.peak(dtype) == max(rates.products.rates)
    assert sheet.environment["device"] == "cpu" and sheet.environment["cpu_share"] > 0


def test_it_is_kept_and_found_again_by_name(sheet, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    path = store(sheet)
    assert path.is_relative_to(tmp_path) and json.loads(path.read_text())["name"] == "this-machine"
    assert wb.hardware("this-machine") == sheet
    assert [entry.name for entry in path.parent.iterdir()] == ["this-machine.json"]


def test_it_predicts_a_run_on_this_machine(sheet, tiny):
    session = wb.Session(tiny)
    session.prefill("Return the absolute value. " * 4)
    session.generate(3)
    table = wb.beside_measured(session.trace, sheet)
    assert table["phase"].tolist() == ["prefill", "decode"] and (table["predicted_s"] > 0).all()
    planned = wb.predict(wb.anatomy(random_llama().config), sheet, context=30, new_tokens=2)
    assert (planned.table["predicted_s"] > 0).all() and planned.predicted_s < 1000
