"""LazyEviction: the sheet's worked examples, the state of each token against a plain loop, and the times of decisions."""

from __future__ import annotations

import math

import pytest
import torch

import workbench as wb
from workbench.engine.policy import LayerState
from workbench.methods.cache.lazy_eviction import importance
from workbench.testing import ids, random_llama


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(), tiny.tokenizer))


def test_worked_example_of_the_importance():
    last, mri = torch.tensor([[10, 9, 10, 8, 8, 2], [0, 0, 2, 2, 8, 8]], dtype=torch.int32)
    expected = torch.tensor([0.5379, 0, 1.0758, 0.7763, 0.4472, 0.2402])
    torch.testing.assert_close(importance(10, last, mri), expected, atol=5e-5, rtol=0)
    # The paper's text leaves out the 1: 2 sigmoid(-(10 - 8) / 2) instead of 2 sigmoid(-2), the second term the same.
    by_paper = 2 / (1 + math.exp(1)) + 2 / (1 + math.exp(1))
    assert importance(10, last, mri, "paper")[3].item() == pytest.approx(by_paper, abs=1e-4)


def state(last, mri, capacity, now) -> LayerState:
    keys = torch.zeros(1, 1, len(last), 2)
    side = {"last": torch.tensor(last, dtype=torch.int32), "mri": torch.tensor(mri, dtype=torch.int32)}
    side = {name: tensor.view(1, 1, -1) for name, tensor in side.items()}
    positions = torch.arange(len(last)).view(1, 1, -1)
    return LayerState(keys, keys, positions, torch.tensor([capacity]), 1.0, 0, 1, "decode", side=side, since_prompt=now)


def test_worked_example_of_a_decision():
    seen = state([6, 2, 5, 0, 4, 5, 6, 6], [1, 2, 4, 0, 3, 1, 0, 0], capacity=5, now=6)
    mask = wb.LazyEviction(budget=5, window=3).keep(seen)
    assert mask[0, 0].nonzero().flatten().tolist() == [0, 1, 5, 6, 7]
    # A window that the budget has no room for is cut to half of it, rounded up.
    mask = wb.LazyEviction(budget=5, window=8).keep(seen)
    assert mask[0, 0].nonzero().flatten().tolist() == [0, 1, 5, 6, 7]


def run(lm, method, prompt, steps):
    session = wb.Session(lm, method)
    session.prefill(prompt)
    lengths = []
    for _ in range(steps):
        session.step()
        lengths.append([layer.store.length for layer in session._cache.layers])
    return session, lengths


def test_between_decisions_nothing_goes_and_the_length_is_a_saw_tooth(lm):
    session, lengths = run(lm, wb.LazyEviction(budget=22, window=5), ids(20)[0].tolist(), 20)
    expected = [21, 22, 23, 24, 22, 23, 24, 25, 26, 22, 23, 24, 25, 26, 22, 23, 24, 25, 26, 22]
    assert lengths == [[each] * 3 for each in expected]
    cache = session.trace.table("cache")
    assert set(cache[cache["op"].isin(["due", "evict"])]["step"]) == {5, 10, 15, 20}
    assert (cache[cache["op"] == "append"].query("step > 0")["nominal_bytes"] <= 22 * 2 * 2 * 8 * 4).all()


def test_the_prompt_is_never_compressed_but_its_tokens_may_go_later(lm):
    session, lengths = run(lm, wb.LazyEviction(budget=0.5, window=4), ids(40)[0].tolist(), 4)
    assert lengths == [[41] * 3, [42] * 3, [43] * 3, [20] * 3]
    assert (session.trace.table("evictions")["position"] < 40).any()


def test_alpha_zero_is_a_look_at_every_step(lm):
    session, lengths = run(lm, wb.LazyEviction(budget=30, window=4, alpha=0.0), ids(28)[0].tolist(), 7)
    assert lengths[-1] == [33] * 3
    for layer in session._cache.layers:
        assert (layer.store.side["last"] == 7).all() and (layer.store.side["mri"] == 1).all()


@pytest.mark.parametrize("turn", [1, 3, 40])
def test_state_equals_a_plain_loop_over_steps(lm, turn):
    """Two decoded tokens, an appended turn and a decoded token, from the attention of transformers' own eager model."""
    alpha, length = 0.02, 12
    eager = wb.load((random_llama(attn_implementation="eager"), lm.tokenizer))
    more = ids(turn + 3, seed=9)[0].tolist()
    session = wb.Session(eager, wb.LazyEviction(budget=1000, window=128, alpha=alpha))
    prompt = ids(length)[0].tolist()
    session.prefill(prompt)
    session.step(more[:1])
    session.step(more[1:2])
    session.append(more[2:-1])
    session.step(more[-1:])
    with torch.no_grad():
        attentions = eager.model(torch.tensor([prompt + more]), output_attentions=True).attentions
    for layer, seen in zip(session._cache.layers, attentions, strict=True):
        for head in range(2):
            last, mri = [0] * length, [0] * length
            for now in range(1, len(more) + 1):
                last.append(now - 1)
                mri.append(0)
                for token in range(len(last)):
                    if max(seen[0, each, length + now - 1, token] for each in (2 * head, 2 * head + 1)) >= alpha:
                        mri[token] = max(mri[token], now - last[token])
                        last[token] = now
            assert layer.store.side["last"][0, head].tolist() == last
            assert layer.store.side["mri"][0, head].tolist() == mri


def test_an_appended_turn_decides_if_its_step_came_meanwhile(lm):
    session = wb.Session(lm, wb.LazyEviction(budget=10, window=8))
    session.prefill(ids(20)[0].tolist())
    session.append(ids(7, seed=1)[0].tolist())
    assert session._cache.layers[0].store.length == 27
    session.append(ids(3, seed=2)[0].tolist())
    assert session._cache.layers[0].store.length == 10
    session.append(ids(5, seed=3)[0].tolist())
    assert session._cache.layers[0].store.length == 15


def test_a_comparison_asks_for_evictions_only_at_decisions(tiny):
    workload = wb.workloads.recall(context=96, samples=1, facts=1)
    often, seldom = wb.compare(tiny, workload, ["lazy-eviction:window=2", "lazy-eviction"]).rows[1:]
    assert often.fired_layers == often.layers == 4 and 0 < often.fired_steps == often.steps
    assert seldom.fired == "nothing to do" and seldom.kl_to_dense == 0
