"""A recording holds exactly what the model's attention saw, says what it takes before it runs, and survives a disk."""

from __future__ import annotations

import os

import pytest
import torch

import workbench as wb
from workbench.experiments.record import recording_bytes
from workbench.probes.memory import free_bytes
from workbench.testing import ids, random_gemma, random_llama, random_model

PROMPT, NEW = 30, 5


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(), tiny.tokenizer))


@pytest.fixture(scope="module")
def recording(lm) -> wb.Recording:
    return wb.record(lm, ids(PROMPT), new_tokens=NEW, rehearse=["dapq:tokens=4"])


@pytest.mark.parametrize("family", ["llama", "gemma2", "gemma3_text", "gpt_oss", "qwen3"])
def test_attention_over_the_recording_is_that_of_the_model(tiny, family):
    """The recorded tensors give the eager model's attention matrix, scaling, softcap and sinks included."""
    lm = wb.load((random_model(family, attn_implementation="eager"), tiny.tokenizer))
    recording = wb.record(lm, ids(PROMPT), new_tokens=NEW)
    tokens = recording.trace.table("tokens")["id"].tolist()
    assert len(tokens) == recording.tokens == PROMPT + NEW and recording.steps == NEW
    with torch.no_grad():
        attentions = lm.model(torch.tensor([tokens]), output_attentions=True).attentions
    assert recording.layers
    for layer in recording.layers:
        group = layer.queries.shape[0] // layer.keys.shape[0]
        scores = layer.queries @ layer.keys.repeat_interleave(group, 0).transpose(-1, -2) * layer.scaling
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -torch.inf)
        if layer.sinks is not None:
            scores = torch.cat([scores, layer.sinks.view(-1, 1, 1).expand(*scores.shape[:2], 1)], -1)
        weights = scores.softmax(-1)[..., : len(tokens)]
        torch.testing.assert_close(weights, attentions[layer.layer][0], atol=1e-5, rtol=1e-4)
        received = weights[:, :PROMPT, :PROMPT].sum(1).unflatten(0, (-1, group)).sum(1)
        torch.testing.assert_close(layer.prompt_mass, received, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("family", "planes"), [("llama", [4, 4, 4]), ("smollm3", [4, 0, 4]), ("gpt2", [None, None, None])])
def test_how_each_layer_rotates_is_recorded(tiny, family, planes):
    """Positions of GPT-2 are part of its embedding, so nothing can be said of its layers."""
    layers = wb.record(wb.load((random_model(family), tiny.tokenizer)), [2, 3, 4], new_tokens=1).layers
    assert [None if layer.frequencies is None else len(layer.frequencies) for layer in layers] == planes
    assert all(layer.frequencies[0] == 1 for layer in layers if layer.frequencies)


def test_the_run_is_the_plain_one(lm, recording):
    session = wb.Session(lm)
    session.prefill(ids(PROMPT))
    session.generate(NEW, stop_at_end=False)
    assert recording.trace.table("tokens")["id"].tolist() == session.tokens[0]
    assert recording.trace.complete and recording.trace.setup == "dense"


def test_layers_are_chosen_and_sliding_ones_left_out(tiny, lm):
    assert [layer.layer for layer in wb.record(lm, [2, 3, 4], new_tokens=1, layers=[2, 0]).layers] == [0, 2]
    gemma = wb.load((random_gemma(), tiny.tokenizer))
    assert [layer.layer for layer in wb.record(gemma, [2, 3, 4], new_tokens=1).layers] == [1]
    with pytest.raises(wb.UserError, match=r"Layer 0 has a sliding window.*choose among \[1\]"):
        wb.record(gemma, [2, 3, 4], layers=[0])


@pytest.mark.parametrize("make", [random_llama, random_gemma])
def test_the_size_is_known_in_advance_and_limited(tiny, make):
    lm = wb.load((make(), tiny.tokenizer))
    recording = wb.record(lm, ids(PROMPT), new_tokens=NEW)
    layers = [layer.layer for layer in recording.layers]
    size = recording_bytes(lm.anatomy, layers, PROMPT, PROMPT + NEW)
    assert recording.nbytes == size
    rehearsed = wb.record(lm, ids(PROMPT), new_tokens=NEW, rehearse=["dapq:tokens=3", "dapq:tokens=4"])
    assert rehearsed.nbytes == recording_bytes(lm.anatomy, layers, PROMPT, PROMPT + NEW, 2)
    assert wb.record(lm, ids(PROMPT), new_tokens=NEW, memory_limit_bytes=size).nbytes == size
    with pytest.raises(wb.UserError, match=f"takes {size:,} bytes and the limit is {size - 1:,}"):
        wb.record(lm, ids(PROMPT), new_tokens=NEW, memory_limit_bytes=size - 1)


def test_save_and_load(recording, tmp_path):
    path = recording.save(tmp_path / "rec")
    again = wb.Recording.load(path)
    assert again.rehearsals == recording.rehearsals and len(again.rehearsals) == 1
    assert again.prompt_tokens == PROMPT and repr(again) == repr(recording)
    for one, other in zip(recording.layers, again.layers, strict=True):
        assert (one.layer, one.scaling, one.softcap) == (other.layer, other.scaling, other.softcap)
        assert one.frequencies == other.frequencies and one.interleaved == other.interleaved
        assert one.tensors().keys() == other.tensors().keys()
        assert all(torch.equal(tensor, other.tensors()[name]) for name, tensor in one.tensors().items())
    assert wb.Trace.load(path).table("tokens").equals(recording.trace.table("tokens"))


@pytest.mark.parametrize("length", [0, 5, 200, 2000, -1])
def test_a_recording_cut_short_is_one_sentence(recording, tmp_path, length):
    file = recording.save(tmp_path / "rec") / "recording.safetensors"
    file.write_bytes(file.read_bytes()[:length])
    with pytest.raises(wb.UserError, match="damaged or cut short; record it again") as caught:
        wb.Recording.load(tmp_path / "rec")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", [-1, -100, -2000])
def test_a_recording_with_one_bit_changed_is_one_sentence(recording, tmp_path, place):
    file = recording.save(tmp_path / "rec") / "recording.safetensors"
    changed = bytearray(file.read_bytes())
    changed[place] ^= 1
    file.write_bytes(changed)
    with pytest.raises(wb.UserError, match="damaged or cut short; record it again"):
        wb.Recording.load(tmp_path / "rec")


def test_the_tensors_of_another_run_are_refused(lm, recording, tmp_path):
    one = recording.save(tmp_path / "one")
    other = wb.record(lm, ids(PROMPT, seed=1), new_tokens=NEW).save(tmp_path / "other")
    (other / "recording.safetensors").write_bytes((one / "recording.safetensors").read_bytes())
    with pytest.raises(wb.UserError, match="damaged or cut short"):
        wb.Recording.load(other)


def test_more_memory_than_there_is_is_refused_before_anything_runs(lm, recording, monkeypatch):
    monkeypatch.setattr("workbench.experiments.record.free_bytes", lambda device: 1000)
    with pytest.raises(wb.UserError, match=r"takes [\d,]+ bytes and 1,000 are free; choose fewer layers or tokens"):
        wb.record(lm, ids(PROMPT), new_tokens=NEW)
    monkeypatch.setattr("workbench.experiments.replay.free_bytes", lambda device: 1000)
    with pytest.raises(wb.UserError, match=r"takes about [\d,]+ bytes and 1,000 are free; record fewer new tokens"):
        wb.replay(recording, ["h2o"], [0.5])


def test_free_memory_is_some_of_what_the_machine_has():
    free = free_bytes(torch.device("cpu"))
    assert free is not None and 2**20 < free <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def test_a_damaged_header_and_a_plain_trace_are_one_sentence(recording, tmp_path):
    file = recording.save(tmp_path / "rec") / "recording.safetensors"
    whole = file.read_bytes()
    for old, new in ((b"prompt_tokens", b"prompt_tokenz"), (b'\\"layer\\": 0', b'\\"layer\\": 7'), (b"0.keys", b"9.keys")):
        assert old in whole
        file.write_bytes(whole.replace(old, new))
        with pytest.raises(wb.UserError, match="damaged"):
            wb.Recording.load(tmp_path / "rec")
    file.write_bytes(whole.replace(b'\\"format\\": 3', b'\\"format\\": 2'))
    with pytest.raises(wb.UserError, match="has format 2, and this version reads format 3; record it again"):
        wb.Recording.load(tmp_path / "rec")
    file.unlink()
    with pytest.raises(wb.UserError, match="trace without tensors"):
        wb.Recording.load(tmp_path / "rec")
    with pytest.raises(wb.UserError, match="is not a trace"):
        wb.Recording.load(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([2, 3], {"new_tokens": 0}, "Cannot record 0 new tokens"),
        ([2, 3], {"layers": "some"}, "Cannot record layers 'some'"),
        ([2, 3], {"layers": [3]}, "no layer 3; this model has layers 0 to 2"),
        ([2, 3], {"layers": []}, "no layer to record"),
        ([[2, 3], [4, 5]], {}, "of one prompt, and 2 were given"),
        (["x", "y"], {}, "of one prompt, and 2 were given"),
        ([], {}, "prompt is empty"),
        ([2] * 600, {}, "context of 512"),
        ([2] * 500, {"new_tokens": 5, "rehearse": ["dapq"]}, "'dapq' rehearses 32 tokens after the text, 532 in all"),
        ([2], {"rehearse": ["dapq"]}, "'dapq' rehearses nothing after a prompt of 1 token"),
        ([2, 3], {"rehearse": ["dap"]}, "no method named 'dap'"),
        ([2, 3], {"rehearse": [7]}, "Cannot rehearse 7; give methods, such as 'dapq'"),
    ],
)
def test_misuse_is_one_sentence(lm, prompt, options, message):
    with pytest.raises(wb.UserError, match=message):
        wb.record(lm, prompt, **options)


def test_nothing_is_left_attached_after_an_error(lm):
    with pytest.raises(IndexError):
        wb.record(lm, [10**6], new_tokens=1)
    assert wb.record(lm, [2, 3], new_tokens=1).tokens == 3
