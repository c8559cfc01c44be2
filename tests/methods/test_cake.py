"""CAKE: the sheet's worked examples, and its cascade against deciding once."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch

import workbench as wb
from workbench.engine.policy import LayerState
from workbench.methods.cache.budgets import by_preference
from workbench.methods.cache.cake import mean_and_variance
from workbench.testing import ids, random_llama


def test_worked_example_of_the_indicator():
    """Mean plus 200 times the variance of rows [.5 .3 .2] and [.1 .3 .6]; a third row has no vote."""
    rows = torch.tensor([[0.9, 0.05, 0.05], [0.5, 0.3, 0.2], [0.1, 0.3, 0.6]])
    votes = torch.tensor([False, True, True])[:, None]
    mean, variance = mean_and_variance(rows, votes)
    torch.testing.assert_close(mean + 200 * variance, torch.tensor([16.3, 0.3, 16.4]))
    assert mean_and_variance(rows[2:], votes[2:])[1].tolist() == [0, 0, 0]


def test_worked_examples_of_the_shares():
    assert by_preference([1, 2, 5], 30, [100] * 3) == [4, 8, 18]
    assert by_preference([10, 20], 30, [12, 12]) == [18, 12]  # 18 are more than there are: 24 are kept
    assert by_preference([3.7] * 4, 40, [100] * 4) == [10] * 4
    assert by_preference([0.0] * 4, 40, [100] * 4) == [10] * 4
    assert by_preference([0.7], 30, [12]) == [30]  # the first layer of a cascade


@pytest.mark.parametrize("seed", range(5))
def test_shares_sum_to_the_whole_and_follow_the_preferences(seed):
    generator = torch.Generator().manual_seed(seed)
    preferences = torch.rand(9, generator=generator).sort().values.tolist()
    for total in (0, 1, 8, 100, 1001):
        shares = by_preference(preferences, total, [10**6] * 9)
        assert sum(shares) == total and all(later + 1 >= earlier for earlier, later in itertools.pairwise(shares))


def state(queries, keys, capacity) -> LayerState:
    """One row at the end of a prompt."""
    batch, num_kv_heads, length, dim = keys.shape
    positions = torch.arange(length).expand(batch, num_kv_heads, length)
    side = {"score": torch.zeros(batch, num_kv_heads, length)}
    return LayerState(
        keys, keys, positions, torch.tensor([capacity]), dim**-0.5, 0, 2, "prefill", queries, side=side, dividing=True
    )


def decided(method, queries, keys, capacity):
    """The preference and the mask of one layer."""
    seen = state(queries, keys, capacity)
    observed = method.observe(seen)
    mask = method.keep(dataclasses.replace(seen, queries=None, side={"score": observed["score"]}))
    return observed["report"], mask


def attention(queries, keys, head, group, length, window):
    """Rows of the last queries, as lists of floats."""
    rows = []
    for query in range(length - window, length):
        logits = [float(queries[0, head, query] @ keys[0, head // group, j]) * keys.shape[3] ** -0.5 for j in range(query + 1)]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        rows.append([weight / sum(weights) for weight in weights] + [0.0] * (length - 1 - query))
    return rows


@pytest.mark.parametrize("gamma", [0.0, 200.0])
def test_scores_and_preference_equal_plain_loops(gamma):
    """With gamma 0 these are SnapKV's kept sets: mean attention before the window, pooled over 5, mean over the group."""
    torch.manual_seed(4)
    num_q_heads, num_kv_heads, length, window, capacity, dim = 4, 2, 33, 6, 15, 8
    queries, keys = torch.randn(1, num_q_heads, length, dim) * 2, torch.randn(1, num_kv_heads, length, dim)
    before = length - window
    entropy = shift = 0.0
    total = [[0.0] * before for _ in range(num_kv_heads)]
    for head in range(num_q_heads):
        rows = attention(queries, keys, head, 2, length, window)
        scores = []
        for j in range(before):
            column = [row[j] for row in rows]
            mean = sum(column) / window
            variance = sum((each - mean) ** 2 for each in column) / (window - 1)
            entropy -= sum(each * math.log(each + 1e-10) for each in column)
            shift += variance
            scores.append(mean + gamma * variance)
        for j in range(before):
            total[head // 2][j] += sum(scores[i] for i in range(j - 2, j + 3) if 0 <= i < before) / 5
    method = wb.CAKE(budget=capacity, window=window, gamma=gamma, tau1=1.6, tau2=0.4)
    preference, mask = decided(method, queries, keys, capacity)
    assert preference.item() == pytest.approx(entropy ** (1 / 1.6) * shift ** (1 / 0.4), rel=1e-4)
    for head in range(num_kv_heads):
        best = sorted(range(before), key=lambda j, head=head: -total[head][j])[: capacity - window]
        assert set(mask[0, head].nonzero().flatten().tolist()) == {*best, *range(before, length)}


def test_equal_preferences_are_uniform_and_the_whole_prompt_is_kept_if_it_fits():
    method = wb.CAKE(budget=20, window=8)
    report = torch.tensor([3.0], dtype=torch.float64)
    assert method.share([report] * 3, [[50]] * 3, [50], 3) == [[20]] * 3
    assert method.share([report], [[50]], [50], 3) == [[44]]  # alone, the first layer may have all of (20 - 8) x 3


def kept(lm, method, prompt):
    session = wb.Session(lm, method)
    session.prefill(prompt)
    return session, [sorted(map(sorted, layer.store.positions[0].tolist())) for layer in session._cache.layers]


@pytest.mark.parametrize("budget", [0.2, 0.35])
def test_a_cascade_keeps_what_deciding_once_keeps(tiny, budget):
    """Shares only fall as layers report, and scores stay with their tokens, so it does not matter when they are cut."""
    lm = wb.load((random_llama(num_hidden_layers=6), tiny.tokenizer))
    prompt = ids(80)[0].tolist()
    cascading, by_cascade = kept(lm, wb.CAKE(budget=budget, window=8), prompt)
    _, at_once = kept(lm, wb.CAKE(budget=budget, window=8, cascade=False), prompt)
    assert by_cascade == at_once
    evictions = cascading.trace.table("cache").query("op == 'evict' and step == 0")
    for _, held in evictions.groupby("layer")["held_tokens"]:
        assert held.is_monotonic_decreasing
    assert len(evictions) > 6  # layers are cut several times


def test_a_cascade_holds_less_while_the_prompt_is_read(tiny):
    """The most bytes held by all layers at any moment of the prefill, from the cache rows in the order they were written."""
    lm = wb.load((random_llama(num_hidden_layers=6), tiny.tokenizer))
    most = {}
    for cascade in (True, False):
        session = wb.Session(lm, wb.CAKE(budget=0.1, window=8, cascade=cascade))
        session.prefill(ids(400)[0].tolist())
        held: dict[int, int] = {}
        peaks = []
        for row in session.trace.table("cache").itertuples():
            held[row.layer] = row.physical_bytes
            peaks.append(sum(held.values()))
        most[cascade] = max(peaks)
    # One layer is whole, the others have shares of 6 x 40 tokens; without a cascade all 6 are whole.
    assert most[True] < 0.45 * most[False]


def test_decoding_keeps_each_share_and_scores_by_the_newest_query(tiny):
    lm = wb.load((random_llama(), tiny.tokenizer))
    session = wb.Session(lm, wb.CAKE(budget=0.3, window=6))
    session.prefill(ids(60)[0].tolist())
    start = [layer.store.length for layer in session._cache.layers]
    assert len(set(start)) > 1
    session.generate(10, stop_at_end=False)
    assert [layer.store.length for layer in session._cache.layers] == start
    for layer in session._cache.layers:
        assert set(range(64, 70)) <= set(layer.store.positions[0, 0].tolist())
    # At every step one query goes over the keys held, its own token's included: 2 x query heads x keys x head size.
    flops = session.trace.flops(by=["phase", "component"]).query("component == 'method'").set_index("phase")["flops"]
    assert flops["prefill"] == 3 * 2 * 4 * 6 * 60 * 8  # layers x 2 x query heads x window x keys x head size, once
    assert flops["decode"] == 10 * sum(2 * 4 * (length + 1) * 8 for length in start)
