"""Rehearsed tokens change nothing but the choice: no row of them stays, no logit moves, and their cost is in the trace."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.probes.counting import FlopCount
from workbench.testing import ids, random_gemma, random_llama, random_model

REHEARSING = [
    wb.DapQ(budget=12, tokens=5),
    wb.DapQ(budget=12, tokens=5, source="continuation"),
    wb.Oracle(budget=12, horizon=5),
]


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(), tiny.tokenizer))


@pytest.mark.parametrize("method", REHEARSING, ids=lambda method: method.label)
def test_rows_within_their_budget_are_dense_bit_for_bit(lm, method):
    """The long row of a batch makes the method rehearse, and the short one, which keeps everything, must not notice."""
    prompts = [ids(length, seed=length)[0].tolist() for length in (40, 9)]
    dense, session = wb.Session(lm), wb.Session(lm, method)
    assert torch.equal(session.prefill(prompts), dense.prefill(prompts))
    assert "rehearsal" in set(session.trace.table("steps")["phase"])
    for ours, theirs in zip(session._cache.layers, dense._cache.layers, strict=True):
        assert ours.store.positions[1, 0].tolist()[-9:] == list(range(9)) and ours.store.length == 12
        assert torch.equal(ours.store.keys[1, :, -9:], theirs.store.keys[1, :, -9:])
        assert torch.equal(ours.store.values[1, :, -9:], theirs.store.values[1, :, -9:])
        assert ours.get_seq_length() == theirs.get_seq_length() == 40
        assert ours.store.positions.max() < 40
    for _ in range(4):
        a, b = session.step([5, 6]), dense.step([5, 6])
        torch.testing.assert_close(a[1], b[1], atol=1e-5, rtol=1e-5)
    assert session._cache.layers[0].store.positions.max() == 43


def test_layers_that_are_not_due_take_the_tokens_back(tiny):
    """Sliding layers, which forget for good, hold after a rehearsal exactly what they held before it."""
    lm = wb.load((random_gemma(), tiny.tokenizer))
    dense, session = wb.Session(lm), wb.Session(lm, wb.DapQ(budget=10, tokens=20))
    assert torch.equal(session.prefill(ids(40)), dense.prefill(ids(40)))
    for layer in (0, 2):
        ours, theirs = session._cache.layers[layer].store, dense._cache.layers[layer].store
        last = torch.arange(40 - 15, 40)
        assert torch.equal(ours.positions[0, 0, -15:], last.int()) and torch.equal(theirs.positions[0, 0, -15:], last.int())
        assert torch.equal(ours.keys[:, :, -15:], theirs.keys[:, :, -15:])
    assert session._cache.layers[1].store.length == 10


def test_nothing_is_rehearsed_where_nothing_has_to_go(lm):
    session = wb.Session(lm, wb.DapQ(budget=40))
    session.prefill(ids(40))
    assert session.trace.table("steps")["phase"].tolist() == ["prefill"]


def test_a_rehearsal_is_a_step_of_its_own(lm):
    session = wb.Session(lm, wb.DapQ(budget=12, tokens=5))
    session.prefill(ids(40))
    session.step()
    trace = session.trace
    steps = trace.table("steps")
    assert steps["phase"].tolist() == ["prefill", "rehearsal", "decode"]
    assert steps["tokens"].tolist() == [40, 5, 1] and steps["context"].tolist() == [40, 45, 41]
    assert trace.table("tokens")["position"].tolist() == list(range(41))
    cache = trace.table("cache").query("step == 1 and layer == 0")
    assert cache["op"].tolist() == ["append", "score", "crop", "due", "evict"]
    assert cache["held_tokens"].tolist() == [2 * 45, 2 * 45, 2 * 40, 2 * 40, 2 * 12]
    assert trace.summary()["phase"].tolist() == ["prefill", "rehearsal", "decode"]
    assert trace.bytes(model="eager") > trace.bytes(model="fused") > 0
    oracle = wb.Session(lm, wb.Oracle(budget=12, horizon=3))
    oracle.prefill(ids(40))
    assert oracle.trace.table("steps")["phase"].tolist() == ["prefill"] + 3 * ["rehearsal"]
    assert oracle.trace.table("steps")["context"].tolist() == [40, 41, 42, 43]


@pytest.mark.parametrize("method", REHEARSING, ids=lambda method: method.label)
@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_flops_of_the_trace_are_those_torch_counts(tiny, method, family):
    lm = wb.load((random_model(family, experts_implementation="eager"), tiny.tokenizer))
    session = wb.Session(lm, method)
    counter = FlopCount()
    with counter:
        session.prefill(ids(40))
        session.step()
    assert session.trace.flops() == counter.flops


def test_a_comparison_counts_the_rehearsal_before_the_first_token(tiny):
    workload = wb.workloads.recall(context=96, samples=1, facts=1)
    dense, row = wb.compare(tiny, workload, [wb.DapQ(budget=0.3, tokens=8)]).rows
    snapkv = wb.compare(tiny, workload, [wb.SnapKV(budget=0.3)]).rows[1]
    assert row.prefill_flops > snapkv.prefill_flops > dense.prefill_flops
    trace = wb.compare(tiny, workload, [wb.DapQ(budget=0.3, tokens=8)]).traces["dapq(budget=0.3, tokens=8)"]
    by = trace.flops(by="phase").set_index("phase")["flops"]
    assert by["rehearsal"] > 0
    steps = trace.table("steps").groupby("phase")["duration_ns"].sum()
    assert wb.cost.metrics.ttft_ns(trace) == steps["prefill"] + steps["rehearsal"]


def test_a_method_swapped_in_rehearses_after_the_next_token(lm):
    session, dense = wb.Session(lm), wb.Session(lm)
    for each in (session, dense):
        each.prefill(ids(40))
    session.swap(wb.Oracle(budget=12, horizon=4))
    assert torch.equal(session.step(), dense.step())
    assert session._cache.layers[0].store.length == 12
    assert session.trace.table("steps")["phase"].tolist() == ["prefill", "decode"] + 4 * ["rehearsal"]
    session.step()
    assert session.trace.table("steps")["phase"].iloc[-1] == "decode"


def test_a_rehearsal_that_does_not_fit_is_refused_before_anything_runs(lm):
    session = wb.Session(lm, wb.DapQ(budget=0.5))
    with pytest.raises(wb.UserError, match=r"'dapq' rehearses 32 tokens.*512; shorten"):
        session.prefill(ids(500))
    assert session.trace.table("steps").empty
    session.prefill(ids(480))


def test_importance_is_that_of_the_text(lm):
    session, dense = (wb.Session(lm, method, importance="full") for method in (wb.Oracle(budget=12, horizon=4), None))
    for each in (session, dense):
        each.prefill(ids(40))
    ours, theirs = (each.trace.table("importance") for each in (session, dense))
    assert len(ours) == len(theirs) and all((a == b).all() for a, b in zip(ours["mass"], theirs["mass"], strict=True))
