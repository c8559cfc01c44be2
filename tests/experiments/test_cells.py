"""A comparison goes on where it was killed, takes what is finished, and nothing that is not its own."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch

import workbench as wb
import workbench.experiments.compare as comparing
from workbench.experiments.cells import method_fingerprint
from workbench.testing import random_llama

METHODS = ["snapkv:budget=0.5", "streaming-llm:budget=0.3"]
MEASURED = ("ttft_s", "tpot_s", "peak_memory_bytes", "peak_memory_reason", "joules", "joules_reason")


@pytest.fixture
def workload() -> wb.workloads.Workload:
    return wb.workloads.recall(context=96, samples=2, facts=2)


class Killed(BaseException):
    """Stands for the end of the process."""


def counting(ran: list[str], kill_at: tuple[str, int] | None = None):
    """Notes the setup of each episode run, and ends the run at one."""

    def advance(label: str, done: int, total: int) -> None:
        ran.append(f"{label} {done}/{total}")
        if (label, done) == kill_at:
            raise Killed

    return advance


def without_clock(comparison: wb.Comparison) -> list[dict]:
    """The rows without what is measured anew each time."""
    rows = [dataclasses.asdict(row) for row in comparison.rows]
    return [{name: value for name, value in row.items() if name not in MEASURED} for row in rows]


def test_a_killed_run_loses_only_the_cell_it_was_at(tiny, workload, tmp_path):
    whole = wb.compare(tiny, workload, METHODS)
    with pytest.raises(Killed):
        wb.compare(tiny, workload, METHODS, out=tmp_path, on_progress=counting([], ("streaming-llm(budget=0.3)", 1)))
    ran: list[str] = []
    resumed = wb.compare(tiny, workload, METHODS, out=tmp_path, on_progress=counting(ran))
    assert ran == ["dense 2/2", "snapkv(budget=0.5) 2/2", "streaming-llm(budget=0.3) 1/2", "streaming-llm(budget=0.3) 2/2"]
    assert without_clock(resumed) == without_clock(whole)
    again = wb.compare(tiny, workload, METHODS, out=tmp_path)
    assert again.rows == resumed.rows and again.about == resumed.about
    for label, trace in resumed.traces.items():
        assert again.traces[label].table("steps").equals(trace.table("steps"))


def test_fresh_runs_everything_again(tiny, workload, tmp_path):
    wb.compare(tiny, workload, METHODS[:1], out=tmp_path)
    ran: list[str] = []
    wb.compare(tiny, workload, METHODS[:1], out=tmp_path, fresh=True, on_progress=counting(ran))
    assert len(ran) == 4


def test_a_cell_of_another_model_workload_or_setup_is_not_taken(tiny, tmp_path, monkeypatch):
    run, calls = comparing._run, []
    monkeypatch.setattr(comparing, "_run", lambda *args: calls.append("run") or run(*args))
    torch.manual_seed(1)
    lm = wb.load((random_llama(vocab_size=len(tiny.tokenizer)), tiny.tokenizer))
    workload = wb.workloads.text(context=64, samples=1, continuation=3)
    wb.compare(lm, workload, METHODS[:1], out=tmp_path)
    changed = wb.load((copy.deepcopy(lm.model), tiny.tokenizer))
    with torch.no_grad():
        changed.model.model.layers[1].mlp.down_proj.weight[0, 0] += 1e-3
    for model, chosen, methods, expected in (
        (lm, workload, METHODS[:1], 0),
        (changed, workload, METHODS[:1], 2),
        (lm, dataclasses.replace(workload, seed=1), METHODS[:1], 2),
        (lm, dataclasses.replace(workload, continuation=4), METHODS[:1], 2),
        (lm, workload, ["snapkv:budget=0.5,window=4"], 1),
    ):
        calls.clear()
        wb.compare(model, chosen, methods, out=tmp_path)
        assert len(calls) == expected


@pytest.mark.parametrize("change", ["cut", "key", "trace"])
def test_a_damaged_cell_is_run_again(tiny, workload, tmp_path, change):
    first = wb.compare(tiny, workload, [], out=tmp_path)
    (file,) = (tmp_path / "cells").glob("*.json")
    if change == "cut":
        file.write_text(file.read_text()[:-20])
    elif change == "key":
        file.write_text(file.read_text().replace('"facts": 2', '"facts": 3'))
    else:
        (file.with_suffix(".trace") / "meta.json").unlink()
    again = wb.compare(tiny, workload, [], out=tmp_path)
    assert without_clock(again) == without_clock(first) and again.rows != first.rows


def test_a_folder_that_cannot_be_written_is_one_sentence(tiny, workload, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(wb.UserError, match="Cannot write to"):
        wb.compare(tiny, workload, [], out=tmp_path / "file")


def written(keeps_first: bool):
    """A method as a notebook cell makes it, twice under one name."""

    class Written(wb.SnapKV):
        """Keeps one end of the text."""

        name = "written"

        if keeps_first:

            def keep(self, state):
                return state.positions < state.capacity.view(-1, 1, 1)
        else:

            def keep(self, state):
                return state.positions > state.newest - state.capacity.view(-1, 1, 1)

    return dataclasses.dataclass(frozen=True)(Written)(budget=0.5)


def test_a_method_that_was_written_anew_is_run_anew(tiny, workload, tmp_path):
    first = wb.compare(tiny, workload, [written(True)], out=tmp_path)
    second = wb.compare(tiny, workload, [written(False)], out=tmp_path)
    assert first.rows[1].setup == second.rows[1].setup and first.rows[1].kl_to_dense != second.rows[1].kl_to_dense
    ran: list[str] = []
    again = wb.compare(tiny, workload, [written(True)], out=tmp_path, on_progress=counting(ran))
    assert again.rows == first.rows and all(entry.endswith("2/2") for entry in ran)


def test_a_method_is_the_same_whatever_order_a_set_in_it_is_in():
    """In every process names are in another order in a set; 0 and 8, which collide, in the order they came."""

    def fingerprint_of(members: str) -> str:
        keep = eval(f"lambda self, state: state.layer in {members}", globals())
        method = type("Written", (wb.SnapKV,), {"keep": keep, "__module__": __name__})
        return method_fingerprint(dataclasses.dataclass(frozen=True)(method)())

    assert repr(frozenset([0, 8])) != repr(frozenset([8, 0]))
    assert fingerprint_of("{0, 8}") == fingerprint_of("{8, 0}") != fingerprint_of("{0, 9}")


def test_a_method_that_was_calibrated_anew_has_another_key(tiny):
    method = wb.Setup(wb.CompressKV(budget=0.5)).ready(tiny).cache
    tables = {name: tensor + 1 for name, tensor in method.calibration.tables.items()}
    other = method.with_calibration(dataclasses.replace(method.calibration, tables=tables))
    assert method_fingerprint(method) == method_fingerprint(wb.Setup(wb.CompressKV(budget=0.5)).ready(tiny).cache)
    assert method_fingerprint(method) != method_fingerprint(other)
