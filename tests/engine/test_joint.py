"""Budgets that layers divide: who reports and decides when, rows by themselves, and what a copy of a session shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import workbench as wb
from workbench.engine.policy import AT_END, CASCADE, REPORT, Side
from workbench.methods.base import budget_knob, knob
from workbench.methods.cache.base import PREFILL_ONLY, CacheMethod, recent
from workbench.testing import ids, random_gemma, random_llama

JOINT = [wb.PrefixKV(budget=0.3), wb.CAKE(budget=0.3, window=6), wb.CAKE(budget=0.3, window=6, cascade=False)]


@dataclass(frozen=True)
class Staircase(CacheMethod):
    """Layer l reports l + 1, and shares are in proportion; what is kept are the latest tokens. It notes how it is called."""

    name: ClassVar[str] = "staircase"
    observes: ClassVar[frozenset[str]] = PREFILL_ONLY
    side: ClassVar[dict] = {"layer": Side(torch.int64, -1)}
    notes: ClassVar[list] = []

    budget: int = budget_knob(10)
    joint: str = knob(AT_END)

    def observe(self, state):
        self.notes.append(("observe", state.layer, state.keys.shape[2]))
        report = torch.full((state.keys.shape[0],), state.layer + 1.0)
        return {"layer": torch.full(state.positions.shape, state.layer), REPORT: report}

    def observation_cost(self, state):
        return 7, 5

    def share(self, reports, held, prompt_tokens, num_layers):
        whole = sum(report[0].item() for report in reports)
        total = self.budget * num_layers
        return [[int(min(n, total * report[0].item() / whole)) for n in row] for report, row in zip(reports, held, strict=True)]

    def keep(self, state):
        assert state.dividing and state.queries is None and (state.side["layer"] == state.layer).all()
        self.notes.append(("keep", state.layer, int(state.capacity[0])))
        return recent(state, state.capacity)


@pytest.fixture
def lm(tiny) -> wb.LM:
    Staircase.notes.clear()
    return wb.load((random_llama(), tiny.tokenizer))


def lengths(session: wb.Session) -> list[int]:
    return [layer.store.length for layer in session._cache.layers]


def test_at_the_end_every_layer_reports_before_the_first_decides(lm):
    session = wb.Session(lm, Staircase())
    session.prefill(ids(40)[0].tolist())
    assert lengths(session) == [5, 10, 15]
    assert Staircase.notes == [
        *[("observe", layer, 40) for layer in range(3)],
        ("keep", 0, 5),
        ("keep", 1, 10),
        ("keep", 2, 15),
    ]
    cache = session.trace.table("cache")
    assert cache.query("op == 'score'")[["extra_flops", "extra_bytes"]].drop_duplicates().values.tolist() == [[7, 5]]


def test_in_a_cascade_earlier_layers_decide_again_after_each_report(lm):
    session = wb.Session(lm, Staircase(joint=CASCADE))
    session.prefill(ids(40)[0].tolist())
    assert lengths(session) == [5, 10, 15]
    assert Staircase.notes == [
        ("observe", 0, 40),
        ("keep", 0, 30),
        ("observe", 1, 40),
        ("keep", 0, 10),
        ("keep", 1, 20),
        ("observe", 2, 40),
        ("keep", 0, 5),
        ("keep", 1, 10),
        ("keep", 2, 15),
    ]
    assert session._call.reports == []


def test_nothing_is_reported_where_every_row_fits(lm):
    session = wb.Session(lm, Staircase(budget=40))
    session.prefill(ids(40)[0].tolist())
    assert Staircase.notes == [] and lengths(session) == [40] * 3


def test_a_row_that_fits_keeps_what_it_has(lm):
    session = wb.Session(lm, Staircase(budget=12))
    session.prefill([ids(length)[0].tolist() for length in (40, 11)])
    held = [(layer.store.positions >= 0).sum(-1).tolist() for layer in session._cache.layers]
    assert held == [[[6] * 2, [11] * 2], [[12] * 2, [11] * 2], [[18] * 2, [11] * 2]]


@pytest.mark.parametrize("method", JOINT, ids=lambda method: method.label)
def test_a_branch_divides_for_itself(lm, method):
    session = wb.Session(lm)
    session.prefill(ids(50)[0].tolist())
    session.swap(method)
    other, third = session.branch(), session.branch()
    other.step([3])
    after = lengths(other)
    assert sum(after) == 3 * 15 and session._call.capacity == {0: [15], 1: [15], 2: [15]}
    third.swap(wb.StreamingLLM(budget=10))
    third.step([3])
    session.step([3])
    assert lengths(session) == after == lengths(other) and lengths(third) == [10] * 3


@pytest.mark.parametrize("method", JOINT, ids=lambda method: method.label)
def test_side_state_is_freed_by_a_swap_and_counted(lm, method):
    session, plain = wb.Session(lm, method), wb.Session(lm, wb.StreamingLLM(budget=0.3))
    for each in (session, plain):
        each.prefill(ids(50)[0].tolist())
    for layer in session._cache.layers:
        slots = layer.store._buffers["keys"].shape[2]
        assert layer.store.nbytes == 2 * slots * (2 * 8 * 4 + 4 + 4)  # kv heads x slots x (K and V, position, one number)
    session.swap(None)
    assert all(layer.store.side == {} for layer in session._cache.layers)
    for layer in session._cache.layers:
        assert layer.store.nbytes == 2 * layer.store._buffers["keys"].shape[2] * (2 * 8 * 4 + 4)


@pytest.mark.parametrize("method", JOINT, ids=lambda method: method.label)
def test_one_layer_without_a_window_has_the_budget_to_itself(tiny, method):
    session = wb.Session(wb.load((random_gemma(), tiny.tokenizer)), method)
    session.prefill(ids(50)[0].tolist())
    assert session._cache.layers[1].store.length == 15


@pytest.mark.parametrize("method", ["prefixkv:budget=0.4", "cake:budget=0.4", "cake:budget=0.4,cascade=false"])
@pytest.mark.parametrize("model", ["tiny-dense", "tiny-moe"])
def test_each_fires_on_the_built_in_models(model, method):
    lm = wb.load(model)
    row = wb.compare(lm, wb.workloads.recall(context=128, samples=1, facts=1), [method]).rows[1]
    assert 0 < row.fired_layers == row.layers and 0 < row.fired_steps == row.steps


@pytest.mark.parametrize("method", ["prefixkv", "cake:window=8"])
def test_a_replay_of_some_layers_is_refused(lm, method):
    recording = wb.record(lm, ids(40), new_tokens=3, layers=[0, 2])
    with pytest.raises(wb.UserError, match=r"divides its budget among all layers, and layers \[1\] were not recorded"):
        wb.replay(recording, [method], [0.5])
    assert len(wb.replay(recording, ["lazy-eviction:window=2"], [0.5]).points) == 1
