"""Sampling GPUs: the real binding asks a stand-in for NVIDIA's library, in a process of its own."""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import workbench as wb
from workbench.testing import ids, random_llama
from workbench.trace.schema import TABLES

HERE = Path(__file__).parent
COMPILER = shutil.which("cc") or shutil.which("gcc")
LIBRARY = "libnvidia-ml.so.1"
GIB = 1 << 30

needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C compiler to build the stand-in for libnvidia-ml with")
needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="the stand-in is found by LD_LIBRARY_PATH")

Run = Callable[..., Any]
"""Called as `run(code, NAME="value", …)`: what the code left in `result`, those environment variables set meanwhile."""


@contextmanager
def process_with(folder: Path) -> Iterator[Run]:
    """A process that finds its libnvidia-ml in a folder."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder)}
    command = [sys.executable, "-m", "tests.probes.nvml_process"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, env=environment, cwd=HERE.parent.parent, text=True, **pipes) as process:

        def run(code: str, **variables: str) -> Any:
            process.stdin.write(json.dumps({"code": textwrap.dedent(code), "environment": variables}) + "\n")
            process.stdin.flush()
            answer = json.loads(process.stdout.readline())
            assert "error" not in answer, answer.get("error")
            return answer["result"]

        yield run
        process.kill()


def build(folder: Path, *options: str) -> Path:
    source = str(HERE / "nvml_stand_in.c")
    subprocess.run([COMPILER, "-shared", "-fPIC", *options, "-o", str(folder / LIBRARY), source], check=True)
    return folder


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Iterator[Run]:
    with process_with(build(tmp_path_factory.mktemp("driver"))) as run:
        yield run
        assert run("result = [sampling_threads(), counted('opened')]") == [0, 0]


@pytest.fixture(scope="module")
def run_with_old_driver(tmp_path_factory) -> Iterator[Run]:
    with process_with(build(tmp_path_factory.mktemp("old-driver"), "-DNO_ENERGY")) as run:
        yield run


@pytest.fixture(scope="module")
def run_without_driver(tmp_path_factory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("no-driver")
    (folder / LIBRARY).write_text("no library")
    with process_with(folder) as run:
        yield run


PROFILE = """
import torch, workbench as wb
from workbench.testing import ids
with wb.profile(model, device_period_s=0.01) as prof, torch.no_grad():
    model.generate(ids(5), max_new_tokens=40, do_sample=False)
result = [records(prof.trace.table("device")), records(prof.trace.energy())]
"""


@needs_linux
@needs_compiler
def test_two_gpus_with_all_their_values(run):
    rows, _ = run(PROFILE, STAND_IN_GPUS="2")
    assert {row["device"] for row in rows} == {"nvml:0", "nvml:1"}
    for row in rows:
        number = int(row["device"][-1])
        assert row["power_mw"] == 100_000 * (number + 1) and row["used_bytes"] == (number + 1) * GIB
        assert (row["util_percent"], row["memory_util_percent"]) == (50 + number, 20 + number)
        assert (row["clock_mhz"], row["memory_clock_mhz"]) == (1980, 2619)
        # the counter is 100 W times the time, less what has passed of a tick of 50 ms
        assert 0 <= row["t_ns"] * 1e-6 * 100 * (number + 1) - row["energy_mj"] <= 60 * 100 * (number + 1)
        assert row["allocated_bytes"] is None and row["reserved_bytes"] is None
        assert row["reason"] == "allocated_bytes, reserved_bytes: torch does not use this GPU"


@needs_linux
@needs_compiler
def test_a_run_from_end_to_end(run, tmp_path):
    """A prompt, then 1.2 s of decoding (the counter moves every 50 ms), inside another profile; saved and opened again."""
    energy, inner, summary, threads = run(
        f"""
        import time, torch, workbench as wb
        from workbench.testing import ids
        with wb.profile(model, device_period_s=0.01) as outer, torch.no_grad():
            with wb.profile(model, device_period_s=0.02) as prof:
                cache = model(ids(5), use_cache=True, logits_to_keep=1).past_key_values
                until = time.perf_counter() + 1.2
                while time.perf_counter() < until:
                    model(ids(1), past_key_values=cache, logits_to_keep=1)
                    cache.crop(-1)
            threads = [sampling_threads()]
        threads.append(sampling_threads())
        prof.trace.to_perfetto({str(tmp_path / "run.json")!r})
        trace = wb.Trace.load(outer.trace.save({str(tmp_path / "run.trace")!r}))
        result = [*(records(table) for table in (trace.energy(), prof.trace.energy(), trace.summary())), threads]
        """
    )
    assert threads == [1, 0]
    for rows in (energy, inner):
        prefill, decode = rows
        assert decode["seconds"] > 0.5 and abs(decode["joules"] - 100 * decode["seconds"]) <= decode["joules_error"]
        assert decode["joules_per_token"] == decode["joules"] / decode["tokens"] and decode["joules_reason"] is None
        assert decode["mean_power_w"] == 100 and decode["counter_period_s"] >= 0.04
        assert prefill["joules"] is None and "less than 10 periods of the counter" in prefill["joules_reason"]
    assert [row["joules"] for row in summary] == [None, energy[1]["joules"]]
    assert summary[0]["joules_reason"] == energy[0]["joules_reason"]
    events = json.loads((tmp_path / "run.json").read_text())["traceEvents"]
    tracks = {event["name"]: event["args"] for event in events if event["name"].startswith("nvml:0")}
    assert tracks["nvml:0 power"] == {"power_mw": 100_000} and tracks["nvml:0 memory"] == {"used_bytes": GIB}
    assert tracks["nvml:0 utilisation"] == {"util_percent": 50, "memory_util_percent": 20}
    assert min(event["ts"] for event in events) == 0


@needs_linux
@needs_compiler
def test_what_one_gpu_does_not_support_costs_nothing_else(run):
    refused = {"STAND_IN_GPUS": "2", "STAND_IN_REFUSES": "nvmlDeviceGetUtilizationRates", "STAND_IN_GPU": "1"}
    before = run("result = counted('refusals')")
    rows, _ = run(PROFILE, **refused)
    assert run("result = counted('refusals')") == before + 1
    for row in rows:
        second = row["device"] == "nvml:1"
        assert (row["util_percent"] is None) == (row["memory_util_percent"] is None) == second
        assert ("util_percent, memory_util_percent: Not Supported" in row["reason"]) == second
        assert row["energy_mj"] and row["power_mw"] and row["clock_mhz"]
    doctor = run("from workbench.probes.nvml import describe; result = describe()", **refused)
    assert doctor.startswith("driver 550.1, GPUs: 2. nvml:0 (Stand-in 0) reads energy_mj, power_mw, used_bytes, util_percent")
    assert doctor.endswith("not util_percent, memory_util_percent: Not Supported")


@needs_linux
@needs_compiler
def test_a_passing_error_is_asked_again(run):
    rows = run(
        """
        import os
        from workbench.probes.device import DeviceSampler
        sampler = DeviceSampler(period_s=60)
        sampler.start()
        del os.environ["STAND_IN_REFUSES"]
        sampler.sample()
        sampler.stop()
        os.environ["STAND_IN_REFUSES"] = ""
        result = [[row[3], row[-1]] for row in sampler.rows()]
        """,
        STAND_IN_REFUSES="nvmlDeviceGetPowerUsage",
        STAND_IN_CODE="10",
    )
    assert rows[0][0] is None and rows[0][1].startswith("power_mw: Timeout; ")
    assert [row[0] for row in rows[1:]] == [100_000] * 2  # the second sample, and the last one


@needs_linux
@needs_compiler
def test_a_gpu_that_does_not_open_leaves_the_other(run):
    rows, _ = run(
        PROFILE, STAND_IN_GPUS="2", STAND_IN_REFUSES="nvmlDeviceGetHandleByIndex_v2", STAND_IN_GPU="0", STAND_IN_CODE="15"
    )
    for row in rows:
        if row["device"] == "nvml:0":
            assert row["reason"] == "NVML does not open nvml:0: GPU is lost" and row["power_mw"] is None
        else:
            assert row["power_mw"] == 200_000


@needs_linux
@needs_compiler
@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"STAND_IN_INIT": "9"}, "NVML: Driver Not Loaded"),
        (
            {"STAND_IN_INIT": "18"},
            "NVML: RM has detected an NVML/RM version mismatch, so reboot or reload the driver",
        ),
        ({"STAND_IN_INIT": "4"}, "NVML: Insufficient Permissions"),
        ({"STAND_IN_INIT": "4321"}, "NVML: an error of the stand-in"),
        ({"STAND_IN_GPUS": "0"}, "NVML lists no GPU"),
    ],
)
def test_where_nothing_can_be_asked_one_row_says_why(run, variables, reason):
    (row,), energy = run(PROFILE, **variables)
    assert row.pop("reason") == reason and row.pop("t_ns") > 0
    assert not any(row.values())
    for phase in energy:
        assert phase["joules"] is phase["mean_power_w"] is None
        assert phase["joules_reason"] == phase["power_reason"] == reason


@needs_linux
@needs_compiler
def test_an_old_driver_without_the_counter_has_power_and_says_so(run_with_old_driver):
    _, (_, decode) = run_with_old_driver(PROFILE)
    assert decode["joules"] is decode["joules_error"] is decode["joules_per_token"] is decode["counter_period_s"] is None
    assert decode["joules_reason"] == (
        "no energy counter (Function Not Found, as the driver is too old), which GPUs have from Volta on; "
        "power is not integrated instead"
    )
    assert decode["mean_power_w"] == 100


@needs_linux
def test_without_a_driver_a_run_works_and_doctor_says_why(run_without_driver):
    reason = "NVML: NVML Shared Library Not Found, as no NVIDIA driver is installed"
    (row,), _ = run_without_driver(PROFILE)
    assert row["reason"] == reason
    found = run_without_driver(
        """
        import contextlib, io, json, sys
        from workbench import cli, doctor
        doctor._CHECKS = {"NVML": doctor._CHECKS["NVML"]}
        sys.argv = ["workbench", "doctor", "--json"]
        with contextlib.redirect_stdout(io.StringIO()) as out, contextlib.suppress(SystemExit):
            cli.main()
        result = {check["name"]: check for check in json.loads(out.getvalue())["checks"]}["NVML"]
        """
    )
    assert found == {"name": "NVML", "ok": False, "detail": f"{reason}; power and energy are reported as null"}


@needs_linux
@needs_compiler
@pytest.mark.parametrize("error", ["RuntimeError", "KeyboardInterrupt"])
def test_the_thread_ends_with_the_block_whatever_happens_in_it(run, error):
    inside, outside, opened, rows = run(
        f"""
        import workbench as wb
        prof = wb.profile(model, device_period_s=0.01)
        try:
            with prof:
                inside = sampling_threads()
                raise {error}("stop")
        except {error}:
            result = [inside, sampling_threads(), counted("opened"), len(prof.trace.table("device"))]
        """
    )
    assert (inside, outside, opened) == (1, 0, 0) and rows >= 2


@needs_linux
@needs_compiler
def test_slow_queries_make_samples_rarer(run):
    rows, _ = run(PROFILE.replace("0.01", "0.001"), STAND_IN_SLOW_MS="20")
    assert len(rows) >= 3 and all(later["t_ns"] - row["t_ns"] >= 20e6 for row, later in itertools.pairwise(rows))


@needs_linux
@needs_compiler
def test_a_session_is_sampled_while_it_runs_and_no_longer_than_it_lives(run):
    facts = run(
        """
        import gc, time, workbench as wb
        from workbench.testing import ids
        lm = wb.load("tiny-dense")
        session = wb.Session(lm, device_period_s=0.005)
        threads = [sampling_threads()]
        session.prefill(ids(20)[0].tolist())
        session.generate(30)
        threads.append(sampling_threads())
        ran = session.trace
        time.sleep(0.1)
        idle = session.trace
        session.generate(5)
        trace = session.trace
        branch = session.branch()
        branch.generate(3)
        threads.append(sampling_threads())
        branched = branch.trace.table("device")
        session.close()
        del branch
        gc.collect()
        until = time.monotonic() + 10
        while sampling_threads() and time.monotonic() < until:
            time.sleep(0.01)
        threads.append(sampling_threads())
        steps = trace.table("steps")
        samples = trace.table("device")["t_ns"]
        result = {
            "threads": threads,
            "opened": counted("opened"),
            "covered": bool(samples.min() <= steps["start_ns"].min() and samples.max() >= steps["start_ns"].max()),
            "while idle": len(idle.table("device")) - len(ran.table("device")),
            "branched": len(branched),
            "period": trace.meta["device_period_s"],
        }
        """
    )
    assert facts["threads"] == [0, 1, 2, 0] and facts["opened"] == 0
    assert facts["covered"] and facts["period"] == 0.005 and facts["branched"] >= 2
    assert facts["while idle"] <= 4  # what closes the run, and the one the trace asks for; not 20


@needs_linux
@needs_compiler
def test_a_forked_process_goes_on_without_sampling(run):
    status = run(
        """
        import os, signal, warnings, workbench as wb
        with wb.profile(model, device_period_s=0.001) as prof:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)
                child = os.fork()
            if child == 0:
                signal.alarm(60)
                try:
                    prof._devices.sample()
                    prof._devices.stop()
                    os._exit(0 if sampling_threads() == 0 and len(prof._devices.rows()) >= 1 else 1)
                finally:
                    os._exit(2)
        result = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        """
    )
    assert status == 0


PRETEND_CUDA = """
    import time, types, torch
    from workbench.probes import device, nvml
    from workbench.probes.energy import energy
    visible = [1, 0]  # as with CUDA_VISIBLE_DEVICES=1,0
    kept = {name: getattr(torch.cuda, name) for name in (
        "is_initialized", "device_count", "get_device_properties", "memory_stats_as_nested_dict", "synchronize")}
    torch.cuda.is_initialized = lambda: True
    torch.cuda.device_count = lambda: len(visible)
    torch.cuda.get_device_properties = lambda index: types.SimpleNamespace(
        uuid=f"00000000-0000-0000-0000-{visible[index]:012d}")
    torch.cuda.memory_stats_as_nested_dict = lambda index: {
        "allocated_bytes": {"all": {"current": 10 + index}}, "reserved_bytes": {"all": {"current": 20 + index}}}
    torch.cuda.synchronize = lambda device: None
"""
"""Stands in for the few functions of torch.cuda that are asked, none of which runs on a machine without a GPU."""


@needs_linux
@needs_compiler
def test_cuda_devices_are_found_by_uuid(run):
    one, every, block, short, missing = run(
        PRETEND_CUDA
        + """
    def sampled(*devices):
        sampler = device.DeviceSampler(devices, 60)
        sampler.start()
        sampler.stop()
        return [dict(zip(device._COLUMNS, row)) for row in sampler.rows()]
    one = sampled(torch.device("cuda", 0))
    every = sampled()
    with energy(torch.device("cuda", 0)) as used:
        started = time.perf_counter()
        time.sleep(1.02)
        seconds = time.perf_counter() - started
    with energy(torch.device("cuda", 0)) as short:
        pass
    visible.append(7)
    missing = sampled(torch.device("cuda", 2))
    for name, function in kept.items():
        setattr(torch.cuda, name, function)
    result = [one, every, [used.joules, used.reason, seconds], [short.joules, short.reason], missing]
    """,
        STAND_IN_GPUS="2",
    )
    for row in one:  # the second GPU, which draws 200 W, is torch's first
        assert (row["device"], row["power_mw"]) == ("cuda:0", 200_000)
        assert (row["allocated_bytes"], row["reserved_bytes"], row["reason"]) == (10, 20, None)
    assert {(row["device"], row["power_mw"]) for row in every} == {("cuda:1", 100_000), ("cuda:0", 200_000)}
    joules, reason, seconds = block
    assert reason is None and abs(joules - 200 * seconds) <= 200 * 0.2  # a tick of 0.05 s at each end, and the calls
    assert short[0] is None and "shorter than ten periods of the energy counter (1 s)" in short[1]
    assert missing[0]["reason"] == "NVML does not open cuda:2: Not Found" and missing[0]["power_mw"] is None


def test_a_model_off_cuda_is_not_sampled_unless_asked(tiny):
    with wb.profile(random_llama()) as prof:
        pass
    session = wb.Session(tiny)
    session.prefill(ids(5)[0].tolist())
    for trace in (prof.trace, session.trace, session.branch().trace):
        table = trace.table("device")
        assert list(table) == TABLES["device"].names and trace.meta["device_period_s"] is None
        for reason in table["reason"]:
            assert reason == "the model lies on cpu; with device_period_s every GPU is sampled all the same"
    assert len(prof.trace.table("device")) == len(session.trace.table("device")) == 1
    assert session.trace.summary()["joules_reason"].tolist() == table["reason"].tolist() or table.empty


def test_sampling_can_be_switched_off():
    with wb.profile(random_llama(), device_period_s=math.inf) as prof, torch.no_grad():
        prof.model(ids(4))
    assert prof.trace.table("device")["reason"].tolist() == ["sampling was switched off by device_period_s=math.inf"]
    assert prof.trace.summary()["joules_reason"].tolist() == prof.trace.table("device")["reason"].tolist()


@pytest.mark.parametrize("period", [0, -1, 0.0001, math.nan, -math.inf, True, "fast"])
def test_what_is_no_period(tiny, tmp_path, period):
    for start in (lambda **options: wb.profile(tiny.model, **options), lambda **options: wb.Session(tiny, **options)):
        with pytest.raises(wb.UserError, match=r"device_period_s=.* is no sampling period; give 0.001 seconds or more"):
            start(out=tmp_path / "run.trace", device_period_s=period)
    assert not list(tmp_path.iterdir())
