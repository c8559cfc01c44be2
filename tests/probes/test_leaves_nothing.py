"""Whatever goes wrong while a model is profiled, nothing is left behind, and the trace says what is missing."""

from __future__ import annotations

import gc
import os
import signal
import threading
import weakref
from contextlib import contextmanager, suppress

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import workbench as wb
from workbench.probes import profiler
from workbench.probes.attention import _observers, _originals
from workbench.testing import footprint, ids, random_llama, random_model
from workbench.trace.store import TraceWriter

ERRORS = [RuntimeError, KeyboardInterrupt, SystemExit, GeneratorExit]
MODELS = {
    "llama": lambda: random_llama(),
    "qwen3_moe": lambda: random_model("qwen3_moe"),
    "falcon": lambda: random_model("falcon"),  # computes its attention itself
    "opt": lambda: random_model("opt", word_embed_proj_dim=16),  # has matrices beside its layers
    "llama4_text": lambda: random_model("llama4_text"),  # has layers that do not add up
}
POINTS = {
    "model": lambda model: model,
    "decoder": lambda model: model.get_decoder(),
    "layer": lambda model: _layers(model)[0],
    "attention": lambda model: _layers(model)[1].get_submodule(
        "self_attention" if hasattr(_layers(model)[1], "self_attention") else "self_attn"
    ),
    "inside attention": lambda model: next(part for part in _layers(model)[1].modules() if isinstance(part, torch.nn.Linear)),
    "experts": lambda model: model.model.layers[1].mlp.experts,
    "beside the layers": lambda model: model.model.decoder.project_in,
    "head": lambda model: model.get_output_embeddings(),
}
CASES = [("llama", point) for point in ("model", "decoder", "layer", "attention", "inside attention", "head")]
CASES += [("qwen3_moe", "experts"), ("qwen3_moe", "layer"), ("opt", "beside the layers")]
CASES += [("falcon", "attention"), ("falcon", "inside attention"), ("llama4_text", "layer"), ("llama4_text", "attention")]


def _layers(model):
    return next(part for part in model.modules() if isinstance(part, torch.nn.ModuleList))


@contextmanager
def broken(module: torch.nn.Module, place: str, error: type[BaseException]):
    """The module raises before, inside or after its forward."""

    def fail(*_, **__):
        raise error("stop")

    if place == "inside":
        module.forward, remove = fail, lambda: module.__dict__.pop("forward")
    elif place == "before":
        remove = module.register_forward_pre_hook(fail).remove
    else:
        remove = module.register_forward_hook(fail).remove
    try:
        yield
    finally:
        remove()


@torch.no_grad()
def logits(model) -> torch.Tensor:
    return model(ids(6, 2)).logits


def rows(trace: wb.Trace) -> dict[str, list]:
    """Everything counted of a trace's steps, without their numbers and times."""
    names = ("steps", "attention", "cache", "routing", "unattributed", "tokens")
    columns = {"step", "start_ns", "duration_ns"}
    return {
        name: [{k: v for k, v in row.items() if k not in columns} for row in trace.arrow(name).to_pylist()] for name in names
    }


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("place", ["before", "inside", "after"])
@pytest.mark.parametrize(("name", "point"), CASES)
def test_an_error_anywhere_leaves_nothing(name, point, place, error):
    model = MODELS[name]()
    expected, before = logits(model), footprint(model)
    with pytest.raises(error), wb.profile(model, importance="full") as prof, broken(POINTS[point](model), place, error):
        logits(model)
    assert footprint(model) == before and torch.equal(logits(model), expected)
    assert not _observers and not _originals
    trace = prof.trace
    assert "stop" in trace.meta["error"] and not trace.complete
    if (point, place) != ("model", "after"):  # there the call itself was done
        assert trace.table("steps").empty and "1 forward calls did not finish" in trace.notes[-1]


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize(("name", "point"), CASES)
def test_a_failed_call_does_not_touch_the_next_one(name, point, error):
    model = MODELS[name]()
    with wb.profile(model) as clean:
        logits(model)
    with wb.profile(model) as prof:
        with suppress(error), broken(POINTS[point](model), "inside", error):
            logits(model)
        logits(model)
    assert rows(prof.trace) == rows(clean.trace)
    assert prof.trace.meta["unfinished_steps"] == [{"step": 0, "phase": "prefill", "batch": 2, "tokens": 12}]
    assert prof.trace.complete and f"{len(clean.trace.notes) + 1} notes" in repr(prof.trace)


class Stop(LogitsProcessor, BaseStreamer):
    """Raises at the third token, as a logits processor or as a streamer; or lets the process be interrupted."""

    def __init__(self, act):
        self.act, self.count = act, 0

    def __call__(self, input_ids, scores):
        self.put(None)
        return scores

    def put(self, value):
        self.count += 1
        if self.count == 3:
            self.act()

    def end(self):
        pass


def interrupt():
    raise KeyboardInterrupt


def interrupt_by_signal():
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.parametrize("act", [interrupt, interrupt_by_signal])
@pytest.mark.parametrize("way", ["processor", "streamer"])
def test_an_interrupt_between_tokens_leaves_the_tokens_so_far(act, way, tmp_path):
    model = random_llama()
    before = footprint(model)
    stop = Stop(act)
    options = {"logits_processor": LogitsProcessorList([stop])} if way == "processor" else {"streamer": stop}
    with pytest.raises(KeyboardInterrupt), wb.profile(model, out=tmp_path / "run.trace"):
        model.generate(ids(7), max_new_tokens=9, do_sample=False, **options)
    assert footprint(model) == before
    trace = wb.Trace.load(tmp_path / "run.trace")
    steps = trace.table("steps")["phase"].tolist()
    assert steps == ["prefill", *["decode"] * (len(steps) - 1)] and 2 <= len(steps) <= 3
    assert not trace.complete and "KeyboardInterrupt" in trace.meta["error"]
    assert trace.flops() > 0 and len(trace.table("tokens")) == 7 + len(steps) - 1


@pytest.mark.parametrize("hook", ["after_attention", "_begin", "_cache_facts", "_layer_observer", "_mass"])
def test_an_error_of_our_own_leaves_nothing(hook, monkeypatch):
    model = random_llama()
    before = footprint(model)

    def fail(*_, **__):
        raise ZeroDivisionError("ours")

    monkeypatch.setattr(profiler.Profile, hook, fail)
    with pytest.raises(ZeroDivisionError, match="ours"), wb.profile(model, importance="full"):
        logits(model)
    assert footprint(model) == before


PROBES = ["AttentionProbe", "UnplacedProbe", "LayerCheck", "RoutingProbe"]


@pytest.mark.parametrize("part", [*PROBES, "attention_modules", "decoder"])
def test_a_beginning_that_fails_half_way_leaves_nothing(part, monkeypatch):
    model = random_model("qwen3_moe")
    before = footprint(model)

    def fail(*_):
        raise MemoryError("half way")

    if part in PROBES:
        monkeypatch.setattr(getattr(profiler, part), "attach", fail)
    else:
        monkeypatch.setattr(profiler, part, fail)
    with pytest.raises(MemoryError), wb.profile(model):
        pass
    assert footprint(model) == before and not _observers


def test_a_full_disk_is_said_in_a_sentence(tmp_path, monkeypatch):
    model = random_llama()
    before = footprint(model)

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("workbench.trace.store.pq.write_table", full)
    sentence = r"Cannot write the trace to .*No space left on device.*choose another folder"
    with pytest.raises(wb.UserError, match=sentence), wb.profile(model, out=tmp_path / "run.trace"):
        for _ in range(70):
            logits(model)
    assert footprint(model) == before
    with pytest.raises(wb.UserError, match="No space left"), wb.profile(model, out=tmp_path / "run.trace"):
        logits(model)
    with pytest.raises(KeyboardInterrupt) as stopped, wb.profile(model, out=tmp_path / "run.trace"):
        logits(model)
        raise KeyboardInterrupt
    assert "No space left" in stopped.value.__notes__[0]
    assert footprint(model) == before and not wb.Trace.load(tmp_path / "run.trace").complete


def test_the_writer_keeps_its_rows_when_the_disk_is_full(tmp_path, monkeypatch):
    writer = TraceWriter({}, tmp_path / "run.trace")
    writer.add("unattributed", 0, "here", 1)
    with monkeypatch.context() as patch, pytest.raises(wb.UserError):
        patch.setattr("workbench.trace.store.os.replace", lambda *_: (_ for _ in ()).throw(OSError(28, "full")))
        writer.flush(everything=True)
    assert writer.tables()["unattributed"].num_rows == 1


def test_profiles_may_end_in_any_order():
    model = random_llama()
    expected, before = logits(model), footprint(model)
    first, second = wb.profile(model), wb.profile(model)
    first.__enter__()
    logits(model)
    second.__enter__()
    logits(model)
    first.__exit__(None, None, None)
    assert torch.equal(logits(model), expected)
    second.__exit__(None, None, None)
    assert footprint(model) == before and not _observers
    logits(model)
    assert len(first.trace.table("steps")) == 2 and len(second.trace.table("steps")) == 2
    assert rows(first.trace) == rows(second.trace)


def test_a_profile_is_used_once():
    model = random_llama()
    prof = wb.profile(model)
    with prof, pytest.raises(wb.UserError, match="has been used; make a new one"):
        prof.__enter__()
    with pytest.raises(wb.UserError, match="has been used; make a new one"), prof:
        pass
    assert not _observers


def test_a_trace_taken_inside_the_block_stays_as_it_was():
    model = random_llama()
    with wb.profile(model) as prof:
        logits(model)
        inside = prof.trace
        logits(model)
    assert len(inside.table("steps")) == 1 and not inside.complete
    assert len(prof.trace.table("steps")) == 2 and prof.trace.complete


@pytest.mark.parametrize("name", MODELS)
def test_a_model_deleted_while_profiled_is_freed(name):
    model = MODELS[name]()
    with wb.profile(model, importance="full") as prof:
        logits(model)
        freed = [weakref.ref(part) for part in model.modules()]
        del model
        gc.collect()
    gc.collect()
    assert not any(ref() for ref in freed) and not _observers
    assert len(prof.trace.table("steps")) == 1 and prof.trace.flops() > 0


def test_two_models_of_one_config():
    one = random_llama()
    other = AutoModelForCausalLM.from_config(one.config)
    other.config = one.config
    other.eval()
    expected, before = logits(other), footprint(other)
    with wb.profile(one) as prof:
        assert torch.equal(logits(other), expected)
        logits(one)
        with wb.profile(other) as inner:
            logits(other)
    assert len(prof.trace.table("steps")) == len(inner.trace.table("steps")) == 1
    assert footprint(other) == before


def test_a_change_of_attention_inside_the_block_is_seen_and_stays():
    model = random_llama()
    with wb.profile(model) as prof:
        logits(model)
        model.set_attn_implementation("eager")
        logits(model)
    assert prof.trace.table("attention").groupby("step")["kernel"].unique().str[0].tolist() == ["sdpa", "eager"]
    assert model.config._attn_implementation == "eager"


def _run_threads(*jobs):
    threads = [threading.Thread(target=job) for job in jobs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_two_threads_may_call_one_profiled_model():
    model, modes = random_model("qwen3_moe"), []

    def call(length):
        with torch.no_grad():
            for _ in range(8):
                model(ids(length))
        modes.append(footprint(model)["modes"])

    with wb.profile(model) as clean:
        call(5), call(9)
    with wb.profile(model) as prof:
        _run_threads(lambda: call(5), lambda: call(9))
    trace = prof.trace
    assert sorted(trace.table("steps")["tokens"]) == [5] * 8 + [9] * 8
    tokens = dict(zip(trace.table("steps")["step"], trace.table("steps")["tokens"], strict=True))
    for name, column in (("attention", "q_len"), ("routing", "tokens")):
        by_step = trace.table(name).groupby("step")[column].sum()
        assert all(by_step[step] == tokens[step] * (3 if column == "q_len" else 3 * 2) for step in tokens)
    assert trace.flops() == clean.trace.flops() and trace.notes == [] and modes == [0] * 4


def test_two_threads_may_profile_one_model():
    model = random_llama()
    before, traces = footprint(model), {}

    def run(name):
        with wb.profile(model) as prof:
            for _ in range(6):
                logits(model)
        traces[name] = prof.trace

    _run_threads(lambda: run("a"), lambda: run("b"))
    assert footprint(model) == before and not _observers
    for trace in traces.values():
        assert 6 <= len(trace.table("steps")) <= 12  # its own, and those of the other that fell into its time
        assert set(trace.table("attention").groupby("step").size()) == {3}


def test_a_thread_that_dies_in_a_call_leaves_the_others_alone():
    model = random_model("llama4_text")

    def die():
        with suppress(SystemExit), broken(_layers(model)[0], "inside", SystemExit):
            logits(model)

    with wb.profile(model) as prof:
        _run_threads(die)
        logits(model)
    assert len(prof.trace.table("steps")) == 1 and len(prof.trace.meta["unfinished_steps"]) == 1
