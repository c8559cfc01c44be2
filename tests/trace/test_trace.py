"""Traces as values: they survive a round trip, can be cut and merged, and say what is wrong with a damaged one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import textwrap

import pandas as pd
import pytest
import torch

import workbench as wb
from workbench.testing import ids, random_qwen_moe
from workbench.trace.anatomy import Anatomy
from workbench.trace.schema import TABLES


@pytest.fixture(scope="module")
def trace() -> wb.Trace:
    model = random_qwen_moe()
    with wb.profile(model, importance="window") as prof, torch.no_grad():
        model.generate(ids(20), max_new_tokens=5, do_sample=False)
    return prof.trace


def test_round_trip(trace, tmp_path):
    loaded = wb.Trace.load(trace.save(tmp_path / "run.trace"))
    for name in TABLES:
        assert loaded.arrow(name).equals(trace.arrow(name))
    assert loaded.flops() == trace.flops() and loaded.bytes() == trace.bytes()
    assert loaded.anatomy == trace.anatomy and loaded.complete


def test_anatomy_round_trip(trace):
    assert Anatomy.from_dict(json.loads(json.dumps(trace.anatomy.to_dict()))) == trace.anatomy


def test_totals_equal_sums_by_group(trace):
    for by in ("phase", "component", "step", "layer", ["phase", "component"]):
        assert trace.flops(by=by)["flops"].sum() == trace.flops()
        for model in ("eager", "fused"):
            assert trace.bytes(by=by, model=model)["bytes"].sum() == trace.bytes(model=model)
    assert isinstance(trace.flops(), int) and isinstance(trace.bytes(model="eager"), int)


def test_select(trace):
    decode = trace.select(phase="decode")
    assert set(decode.table("steps")["phase"]) == {"decode"}
    assert trace.select(phase="prefill").flops() + decode.flops() == trace.flops()
    assert set(trace.select(layers=[1]).table("attention")["layer"]) == {1}
    assert trace.select(steps=range(1, 3)).table("steps")["step"].tolist() == [1, 2]
    with pytest.raises(wb.UserError, match="no phase 'warm'"):
        trace.select(phase="warm")


def test_merge(trace):
    merged = wb.Trace.merge({"a": trace, "b": trace.select(phase="decode")})
    runs = merged.table("steps").groupby("run").size()
    assert runs["a"] == 5 and runs["b"] == 4
    with pytest.raises(wb.UserError, match="nothing to merge"):
        wb.Trace.merge({})


def test_sql(trace):
    held = trace.sql("select step, sum(held_tokens) as held from cache group by step order by step")
    assert held["held"].tolist() == [3 * 2 * length for length in (20, 21, 22, 23, 24)]
    with pytest.raises(wb.UserError, match="query failed"):
        trace.sql("select nothing from nowhere")
    with pytest.raises(wb.UserError, match="query failed"):
        trace.sql("select * from read_csv('/etc/passwd')")


def test_summary_and_display(trace):
    summary = trace.summary()
    assert summary["phase"].tolist() == ["prefill", "decode"]
    assert summary["flops"].sum() == trace.flops()
    assert "Qwen3MoeForCausalLM" in trace._repr_html_() and "prefill" in trace._repr_html_()


def test_perfetto(trace, tmp_path):
    written = json.loads(trace.to_perfetto(tmp_path / "run.json").read_text())
    events = written["traceEvents"]
    slices = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in slices] == ["prefill"] + ["decode"] * 4
    assert slices[0]["ts"] == 0 and slices[1]["ts"] >= slices[0]["dur"]
    counters = {event["name"] for event in events if event["ph"] == "C"}
    assert counters == {"KV bytes", "FLOPs", *(f"expert load, layer {layer}" for layer in range(3))}
    assert sum(event["args"].get("flops", 0) for event in events) == trace.flops()
    load = [event for event in events if event["name"] == "expert load, layer 0"]
    assert sum(load[0]["args"].values()) == 20 * 2
    (tmp_path / "file").write_text("")
    with pytest.raises(wb.UserError, match="Cannot write"):
        trace.to_perfetto(tmp_path / "file" / "run.json")


def test_csv(trace, tmp_path):
    folder = trace.to_csv(tmp_path / "csv")
    assert pd.read_csv(folder / "steps.csv")["tokens"].tolist() == trace.table("steps")["tokens"].tolist()
    assert not (folder / "evictions.csv").exists()


def test_unknown_table(trace):
    with pytest.raises(wb.UserError, match="no table 'colours'; its tables are steps"):
        trace.table("colours")


def test_not_a_trace(tmp_path):
    with pytest.raises(wb.UserError, match="not a trace"):
        wb.Trace.load(tmp_path)


def test_other_format_version(trace, tmp_path):
    path = trace.save(tmp_path / "run.trace")
    meta = json.loads((path / "meta.json").read_text())
    (path / "meta.json").write_text(json.dumps({**meta, "format_version": 99}))
    with pytest.raises(wb.UserError, match=r"format 99.*reads format 2"):
        wb.Trace.load(path)


@pytest.mark.parametrize("keep", [0, 10, 200])
def test_cut_short(trace, tmp_path, keep):
    path = trace.save(tmp_path / "run.trace")
    part = next((path / "steps").glob("*.parquet"))
    part.write_bytes(part.read_bytes()[:keep])
    with pytest.raises(wb.UserError, match=r"damaged or cut short"):
        wb.Trace.load(path)
    (path / "meta.json").write_text('{"format_ver')
    with pytest.raises(wb.UserError, match=r"meta.json is damaged"):
        wb.Trace.load(path)


def test_a_folder_of_something_else_is_not_overwritten(trace, tmp_path):
    (tmp_path / "precious.txt").write_text("mine")
    with pytest.raises(wb.UserError, match="not empty and holds no trace"):
        trace.save(tmp_path)
    assert (tmp_path / "precious.txt").read_text() == "mine"


def test_killed_process_leaves_a_readable_trace(tmp_path):
    script = """
        import os, signal, sys, torch
        import workbench as wb
        from workbench.testing import ids, random_llama
        model, calls = random_llama(), []
        def kill(*_):
            calls.append(1)
            if len(calls) == 150:
                os.kill(os.getpid(), signal.SIGKILL)
        model.model.layers[1].register_forward_hook(kill)
        with wb.profile(model, out=sys.argv[1]), torch.no_grad():
            for _ in range(200):
                model(ids(3))
    """
    path = tmp_path / "run.trace"
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script), str(path)], env=os.environ, check=False)
    assert done.returncode == -signal.SIGKILL
    trace = wb.Trace.load(path)
    assert not trace.complete and "incomplete" in repr(trace)
    assert len(trace.table("steps")) == 128 and trace.flops() > 0


def test_tables_are_frames(trace):
    assert all(isinstance(trace.table(name), pd.DataFrame) for name in TABLES)
