"""The command line: what it prints, and one sentence with exit code 2 for every mistake."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

import workbench as wb
from workbench import cli, terminal
from workbench.cost.hardware import HARDWARE
from workbench.experiments import calibrate, machine
from workbench.methods import parse_method
from workbench.testing import ids


@pytest.fixture
def run(monkeypatch, capsys, tmp_path):
    """Runs the command line in an empty folder; returns exit code, standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["workbench", *arguments])
        for console in (cli._out, cli._err, terminal._out):
            console.width = 200
        with pytest.raises(SystemExit) as stop:
            cli.main()
        out = capsys.readouterr()
        code = stop.value.code
        return (code if isinstance(code, int) else 0), out.out, out.err

    return call


def test_methods_json(run):
    code, out, _ = run("methods", "--json")
    listed = json.loads(out)
    assert code == 0 and {entry["name"] for entry in listed} == set(wb.METHODS)
    for entry in listed:
        assert set(entry) >= {"name", "slot", "summary", "paper", "knobs", "deviations"}
        for knob in entry["knobs"]:
            assert set(knob) >= {"name", "default", "low", "high", "unit", "help"}


def test_profile_json(run, tmp_path):
    code, out, _ = run("profile", "--prompt-tokens", "100", "--new-tokens", "5", "--method", "h2o:budget=0.3", "--json")
    result = json.loads(out)
    assert code == 0
    prefill, decode = result["phases"]
    assert (prefill["phase"], prefill["tokens"]) == ("prefill", 100) and (decode["phase"], decode["tokens"]) == ("decode", 5)
    assert set(prefill) == {"phase", "tokens", "seconds", "flops", "bytes", "kv_physical_bytes", "kv_nominal_bytes"}
    trace = wb.Trace.load(tmp_path / result["trace"])
    assert trace.complete and trace.flops() == prefill["flops"] + decode["flops"]


def test_profile_of_a_file_with_importance(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("Return the absolute value of the argument.")
    code, out, _ = run("profile", "--prompt-file", "prompt.txt", "--importance", "full", "--out", "mine.trace")
    assert code == 0 and "prefill" in out and "mine.trace" in out
    trace = wb.Trace.load(tmp_path / "mine.trace")
    assert "".join(trace.table("tokens").query("phase == 'prefill'")["text"]).endswith("absolute value of the argument.")
    assert not trace.table("importance").empty


def test_compare_json(run, tmp_path):
    options = ("--context", "128", "--samples", "2", "--method", "snapkv:budget=0.5", "--method", "streaming-llm:budget=20")
    code, out, _ = run("compare", *options, "--out", "cmp", "--json")
    result = json.loads(out)
    assert code == 0 and [row["setup"] for row in result["rows"]] == ["dense", "snapkv(budget=0.5)", "streaming-llm(budget=20)"]
    expected = """setup score nll kl_to_dense top1_agreement ttft_s tpot_s prefill_flops decode_flops decode_bytes
        kv_physical_bytes kv_nominal_bytes fired_layers layers fired_steps steps joules joules_reason"""
    assert set(result["rows"][0]) >= set(expected.split())
    assert (tmp_path / result["report"]).read_text().startswith("<!doctype html>")
    assert len(wb.Comparison.load(tmp_path / "cmp").rows) == 3


def test_compare_at_several_budgets_and_contexts_goes_on_where_it_was(run, tmp_path):
    options = ("tiny-dense", "--methods", "snapkv", "h2o:recent=0.3", "--budgets", "0.5", "20", "--contexts", "96", "128")
    options = (*options, "--workload", "recall:facts=2", "--samples", "1", "--out", "cmp", "--json")
    code, out, _ = run("compare", *options)
    both = json.loads(out)["comparisons"]
    assert code == 0 and [each["about"]["settings"]["context"] for each in both] == [96, 128]
    expected = ["dense", "snapkv(budget=0.5)", "snapkv(budget=20)", "h2o(budget=0.5, recent=0.3)", "h2o(budget=20, recent=0.3)"]
    assert all([row["setup"] for row in each["rows"]] == expected for each in both)
    page = (tmp_path / json.loads(out)["report"]).read_text()
    for each in both:
        assert f"<h2>{each['about']['settings']['context']} tokens</h2>" in page
        assert (tmp_path / "cmp" / f"context-{each['about']['settings']['context']}" / "report.html").exists()
        assert f'href="context-{each["about"]["settings"]["context"]}/report.html"' in page
        assert all(f"<td>{row['kl_to_dense']:.4g}</td>" in page for row in each["rows"])
    assert json.loads(run("compare", *options)[1])["comparisons"] == both  # times and all: nothing ran again
    assert json.loads(run("compare", *options, "--fresh")[1])["comparisons"] != both
    code, out, _ = run("compare", *options[:-1])
    assert code == 0 and "score by question" in out and "score by depth" in out and "All contexts: cmp/report.html" in out


def test_workloads_json(run):
    code, out, _ = run("workloads", "--json")
    listed = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0 and set(listed) == set(wb.workloads.WORKLOADS)
    assert listed["recall"]["settings"]["facts"] == 4 and run("workloads")[0] == 0


def test_replay_json_and_again_from_disk(run, tmp_path):
    options = ("--methods", "h2o", "snapkv:window=8", "--budgets", "0.3", "20", "--json")
    code, out, _ = run("replay", "tiny-dense", "--prompt-tokens", "60", "--new-tokens", "4", "--save", "rec", *options)
    result = json.loads(out)
    assert code == 0 and result["recording"] == "rec" and result["about"]["prompt_tokens"] == 60
    setups = [(row["method"], row["budget"]) for row in result["rows"]]
    assert setups == [("h2o", 0.3), ("h2o", 20), ("snapkv(window=8)", 0.3), ("snapkv(window=8)", 20)]
    assert all(0 < row["mass_retained"] <= row["oracle_mass"] <= 1 for row in result["rows"])
    code, out, _ = run("replay", "rec", *options)
    assert code == 0 and json.loads(out)["rows"] == result["rows"] and json.loads(out)["check"] is None
    code, out, _ = run("replay", "rec")
    assert code == 0 and "best possible" in out and "60 + 4 tokens" in out


def test_replay_with_a_check_in_every_format(run, tmp_path):
    run("replay", "--prompt-tokens", "60", "--new-tokens", "4", "--save", "rec", "--method", "knorm")
    options = ("rec", "--model", "tiny-dense", "--check", "--check-points", "3", "--budgets", "0.3", "20")
    code, out, _ = run("replay", *options, "--out", "replay.html")
    assert code == 0 and "3 points run live" in out and "foretold" in out
    assert "3 points run live" in (tmp_path / "replay.html").read_text()
    code, out, _ = run("replay", *options, "--out", "replay.json", "--json")
    printed = json.loads(out)
    written = json.loads((tmp_path / "replay.json").read_text())
    assert code == 0 and written["rows"] == printed["rows"] and len(written["check"]["points"]) == 3
    assert run("replay", *options, "--out", "replay.csv")[0] == 0
    assert len((tmp_path / "replay.csv").read_text().splitlines()) == 1 + 2 * len(cli.DEMO_METHODS)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--budget", "lots"), "--budgets cannot be 'lots'"),
        (("--budget", "1.5"), "cannot be 1.5"),
        (("--method", "dense"), "no budget to replay"),
        (("--new-tokens", "0"), "0 new tokens"),
        (("nowhere",), "There is no model 'nowhere'"),
        (("tiny-dense", "--model", "tiny-moe"), "Give the model once"),
        (("--prompt-tokens", "0"), "--prompt-tokens cannot be 0"),
        (("--out", "replay.pdf"), "ends in .html, .csv, .json"),
        (("rec", "--check"), "say which with --model"),
        (("rec", "--check", "--model", "tiny-moe"), "The recording is not of tiny-moe"),
        (("rec", "--save", "again"), "rec is a recording already"),
        (("cut",), "damaged or cut short"),
        (("--check", "--check-points", "0", "--prompt-tokens", "20", "--new-tokens", "1"), "Cannot check 0 points"),
        (("--prompt-tokens", "9000"), "tiny-dense has a context of 8192"),
    ],
)
def test_a_wrong_replay_is_one_sentence(run, tmp_path, tiny, arguments, message):
    for name in {"rec", "cut"} & set(arguments):
        file = wb.record(tiny, ids(20), new_tokens=2).save(tmp_path / name) / "recording.safetensors"
        if name == "cut":
            file.write_bytes(file.read_bytes()[:-1])
    code, out, err = run("replay", *arguments)
    assert code == 2 and not out and message in err and len(err.strip().splitlines()) == 1


def test_export(run, tmp_path):
    run("profile", "--prompt-tokens", "20", "--new-tokens", "2")
    code, out, _ = run("export", "run.trace", "--out", "run.json", "--json")
    assert code == 0 and json.loads((tmp_path / json.loads(out)["written"]).read_text())["traceEvents"]
    assert run("export", "run.trace", "--out", "tables", "--format", "csv")[0] == 0
    assert (tmp_path / "tables" / "steps.csv").exists()
    meta = tmp_path / "run.trace" / "meta.json"
    meta.write_text(meta.read_text().replace('"format_version": 2', '"format_version": 7'))
    code, _, err = run("export", "run.trace", "--out", "other.json")
    assert code == 2 and "trace format 7" in err and not (tmp_path / "other.json").exists()


def test_models_and_doctor(run):
    code, out, _ = run("models", "--json")
    models = {entry["name"]: entry for entry in json.loads(out)}
    assert code == 0 and models["tiny-dense"]["ready"] and models["tiny-dense"]["parameters"] > 500_000
    code, out, _ = run("doctor", "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert code == 0 and checks["built-in models"]["ok"]
    assert all(check["detail"] for check in checks.values())
    assert run("doctor")[0] == run("models")[0] == run("methods")[0] == 0


def test_predict_from_a_config_alone(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llama", "num_hidden_layers": 2, "dtype": "bfloat16"}')
    for model in (".", "config.json"):
        options = ("--hardware", "mi300x", "--batch", "2", "--context", "100", "--new-tokens", "4")
        code, out, _ = run("predict", "--model", model, *options, "--json")
        found = json.loads(out)
        assert code == 0 and (found["hardware"], found["dtype"], found["batch"]) == ("mi300x", "bf16", 2)
        assert [phase["tokens"] for phase in found["phases"]] == [200, 8]
        assert found["predicted_s"] == pytest.approx(sum(row["predicted_s"] for row in found["components"]))
        assert "beside_measured" not in found
    code, out, _ = run("predict", "--model", ".", "--context", "5000")
    assert code == 0 and "attention.scores" in out and "fits" in out and "own context is 2048" in out


def test_predict_of_a_trace(run, tmp_path, monkeypatch):
    run("profile", "--prompt-tokens", "50", "--new-tokens", "3")
    code, out, _ = run("predict", "--trace", "run.trace", "--hardware", "h100-sxm", "--dtype", "bf16", "--json")
    found = json.loads(out)
    assert code == 0 and [phase["steps"] for phase in found["phases"]] == [1, 3]
    assert "beside_measured" not in found


def test_measure_the_machine_and_stand_beside_a_measurement(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(machine, "FULL", machine.QUICK)
    run("profile", "--prompt-tokens", "50", "--new-tokens", "3")
    code, _, err = run("predict", "--trace", "run.trace", "--hardware", "this-machine")
    assert code == 2 and "run `workbench doctor --calibrate`" in err
    code, out, _ = run("doctor", "--calibrate", "--json")
    written = json.loads(out)
    assert code == 0 and written["sheet"]["name"] == "this-machine"
    assert json.loads((tmp_path / "cache" / "hardware" / "this-machine.json").read_text()) == written["sheet"]
    code, out, _ = run("predict", "--trace", "run.trace", "--hardware", "this-machine", "--json")
    beside = json.loads(out)["beside_measured"]
    assert code == 0 and [row["phase"] for row in beside] == ["prefill", "decode"]
    assert set(beside[0]) >= {"measured_s", "predicted_s", "error_percent"}
    code, out, _ = run("predict", "--trace", "run.trace", "--hardware", "this-machine")
    assert code == 0 and "Predicted beside measured" in out and "overhead" in out
    assert "this-machine" in run("hardware")[1]
    code, out, _ = run("doctor", "--calibrate")
    assert code == 0 and "GFLOP/s" in out


def test_calibrate_methods(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    code, out, _ = run("calibrate", "--json")
    known = json.loads(out)["calibrations"]
    needing = [method for cls in wb.METHODS.values() for method in cls.to_calibrate() if cls.slot == "cache"]
    assert code == 0 and set(map(parse_method, known)) >= set(needing) and known["compress-kv"]["texts"] == "recall"
    assert "compress-kv" in run("calibrate", "--model", "tiny-moe")[1] and not (tmp_path / "cache").exists()
    compare = ("compare", "--context", "96", "--samples", "1", "--method", "compress-kv:budget=40,kernel=3", "--json")
    code, _, err = run(*compare)
    method = "compress-kv:heads=4,window=8,kernel=3,least=32"
    assert code == 2 and f"run `workbench calibrate --model tiny-dense --method {method}` once" in " ".join(err.split())
    monkeypatch.setattr(calibrate, "TEXTS", 1)
    code, out, _ = run("calibrate", "--method", method, "--json")
    (written,) = json.loads(out)
    assert code == 0 and written["knobs"]["kernel"] == 3 and Path(written["written"]).is_relative_to(tmp_path / "cache")
    assert run(*compare)[0] == 0
    assert "is calibrated for tiny-dense" in " ".join(run("calibrate", "--method", "compress-kv")[1].split())
    monkeypatch.setattr("workbench.engine.gates.PASSES", 1)
    code, out, _ = run("calibrate", "--method", "duo-attention:gates=trained", "--json")
    assert code == 0 and json.loads(out)[0]["knobs"] == {"gates": "trained"}
    assert "workbench calibrate once a model" in " ".join(run("methods")[1].split())
    assert run("calibrate", "--method", "h2o")[0] == 2


def test_hardware(run, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path / "cache"))
    code, out, _ = run("hardware", "--json")
    sheets = {sheet["name"]: sheet for sheet in json.loads(out)}
    assert code == 0 and set(sheets) == set(HARDWARE) and all(sheet["sources"] for sheet in sheets.values())
    code, out, _ = run("hardware", "b200", "--json")
    assert code == 0 and json.loads(out) == sheets["b200"]
    (tmp_path / "mine.json").write_text(out)
    assert json.loads(run("hardware", "mine.json", "--json")[1]) == sheets["b200"]
    assert "workbench doctor --calibrate" in run("hardware")[1] and sheets["l40s"]["sources"][0] in run("hardware", "l40s")[1]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["profile", "--model", "no-such-model"], "There is no model 'no-such-model'"),
        (["profile", "--model", "some/where"], "There is no model 'some/where'"),
        (["profile", "--model", "."], "holds no config.json"),
        (["profile", "--method", "nothing"], "no method named 'nothing'"),
        (["profile", "--method", "h2o:colour=1"], "no knob 'colour'"),
        (["profile", "--method", "h2o:budget=0"], "cannot be 0"),
        (["profile", "--method", "h2o:budget=-1"], "cannot be -1"),
        (["profile", "--method", "h2o:budget=5000%"], "'5000%'"),
        (["profile", "--prompt", ""], "prompt is empty"),
        (["profile", "--prompt", "a", "--prompt-file", "b"], "not both"),
        (["profile", "--prompt-file", "missing.txt"], "Cannot read missing.txt"),
        (["profile", "--prompt-file", "empty.txt"], "empty.txt is empty"),
        (["profile", "--prompt-file", "binary.bin"], "binary.bin"),
        (["profile", "--prompt-file", "zeros.bin"], "zeros.bin"),
        (["profile", "--prompt-tokens", "9000"], "whose context is 8192"),
        (["profile", "--prompt-tokens", "0"], "--prompt-tokens cannot be 0"),
        (["profile", "--new-tokens", "0"], "--new-tokens cannot be 0"),
        (["profile", "--importance", "some"], "importance mode 'some'"),
        (["profile", "--out", "empty.txt/x"], "Cannot write to empty.txt/x"),
        (["profile", "--out", "full"], "full is not empty and holds no trace"),
        (["export", "nowhere", "--out", "x.json"], "not a trace"),
        (["export", "full", "--out", "x.json", "--format", "xml"], "no export format 'xml'"),
        (["compare", "--workload", "chess"], "no workload named 'chess'"),
        (["compare", "--workload", "text", "--query-aware"], "no setting 'query_aware'"),
        (["compare", "tiny-dense", "--model", "tiny-moe"], "Give the model once"),
        (["compare", "--methods", "h2o:budget=0.2", "--budgets", "0.5"], "has a budget of its own"),
        (["compare", "--methods", "h2o", "--budgets", "half"], "--budgets cannot be 'half'"),
        (["compare", "--contexts", "64", "9000", "--workload", "text"], "whose context is 8192"),
        (["compare", "--workload", "recall:colour=1"], "no setting 'colour'"),
        (["compare", "--context", "9000"], "whose context is 8192"),
        (["compare", "--samples", "0"], "samples=0"),
        (["compare", "--method", "h2o:budget=2.5"], "cannot be 2.5"),
        (["compare", "--out", "empty.txt/x"], "Cannot write to empty.txt/x"),
        (["predict"], "either --model or --trace"),
        (["predict", "--model", "tiny-dense", "--trace", "full"], "either --model or --trace"),
        (["predict", "--model", "tiny-dense", "--hardware", "h1000"], "no hardware named 'h1000'"),
        (["predict", "--model", "tiny-dense", "--hardware", "none.json"], "Cannot read the hardware sheet none.json"),
        (["predict", "--model", "tiny-dense", "--hardware", "empty.txt"], "no hardware named 'empty.txt'"),
        (["predict", "--model", "tiny-dense", "--dtype", "fp9"], "no dtype 'fp9'"),
        (["predict", "--model", "tiny-dense", "--dtype", "fp8", "--hardware", "a100-80"], "has no fp8 peak"),
        (["predict", "--model", "tiny-dense", "--context", "0"], "--context cannot be 0"),
        (["predict", "--model", "tiny-dense", "--batch", "-1"], "--batch cannot be -1"),
        (["predict", "--model", "tiny-dense", "--new-tokens", "-1"], "--new-tokens cannot be -1"),
        (["predict", "--model", "no-such-model"], "There is no model 'no-such-model'"),
        (["predict", "--model", "full"], "holds no config.json"),
        (["predict", "--model", "empty.txt"], "empty.txt is no model config"),
        (["predict", "--model", "t5.json"], "describes no causal language model"),
        (["predict", "--trace", "full"], "not a trace"),
        (["hardware", "h1000"], "no hardware named 'h1000'"),
    ],
)
def test_mistakes_are_one_sentence(run, tmp_path, arguments, message):
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    (tmp_path / "zeros.bin").write_bytes(bytes(100))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "t5.json").write_text('{"model_type": "t5"}')
    before = sorted(tmp_path.rglob("*"))
    for extra in ([], ["--json"]):
        code, out, err = run(*arguments, *extra)
        assert code == 2 and out == ""
        assert message in err and err.startswith("Error: ") and "Traceback" not in err
        assert len(err.strip().splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_debug_shows_the_traceback(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["workbench", "profile", "--debug", "--method", "nothing"])
    with pytest.raises(wb.UserError):
        cli.main()
