"""Methods that give each kv head a number of its own: the sheets' worked examples, sums and bounds."""

from __future__ import annotations

import itertools

import pytest
import torch

import workbench as wb
from workbench.engine.policy import LayerState
from workbench.methods.cache.base import keep_top, recent, window_scores
from workbench.methods.cache.budgets import adaptive, adaptive_each, streaming, whole
from workbench.methods.cache.duo_attention import _reach
from workbench.probes.rotation import Rotation
from workbench.testing import ids, random_llama


def layer_state(capacity, num_q_heads=4, num_kv_heads=2, length=50, seed=0, alike=False) -> LayerState:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(1, num_q_heads, length, 8, generator=generator)
    keys, values = torch.randn(2, 1, num_kv_heads, length, 8, generator=generator).unbind(0)
    if alike:
        queries, keys = queries[:, :1].expand_as(queries), keys[:, :1].expand_as(keys)
    positions = torch.arange(length, dtype=torch.int32).expand(1, num_kv_heads, length)
    rotation = Rotation(torch.tensor([1.0, 0.3, 0.05, 0.01]))
    return LayerState(keys, values, positions, torch.tensor([capacity]), 8**-0.5, 0, 1, "prefill", queries, None, rotation)


def test_adakv_worked_example():
    """Two heads of six scores, the first all larger, mean 3: counts [6 0]. Each rounded by itself, as in the paper's code, they
    lose a token; rounded to their sum, the larger remainder, or the earlier head, gets it.
    """
    assert adaptive_each([6, 0], 0.2) == [5, 0]  # 4.8 and 0, for int(0.6) = 0
    assert adaptive_each([6, 0], 0.5) == [4, 1]  # int(1.5) = 1
    assert adaptive_each([6, 0], 0.0) == [6, 0] and adaptive_each([6, 0], 1.0) == [3, 3]
    assert adaptive([6, 0], 0.0) == [6, 0]
    assert adaptive([6, 0], 0.2) == [5, 1]  # 5.4 and 0.6
    assert adaptive([6, 0], 0.5) == [5, 1]  # 4.5 and 1.5
    assert adaptive([6, 0], 1.0) == [3, 3]


@pytest.mark.parametrize("floor", [0.0, 0.2, 0.37, 0.5, 1.0])
def test_adakv_budgets_sum_to_the_total_and_keep_the_floor(floor):
    for hits in itertools.product((0, 1, 7, 30), repeat=3):
        budgets = adaptive(list(hits), floor)
        mean = sum(hits) / 3
        assert sum(budgets) == sum(hits) and all(budget >= int(mean * floor) for budget in budgets)
        assert all(abs(budget - hit * (1 - floor) - mean * floor) < 1 for budget, hit in zip(budgets, hits, strict=True))


def test_adakv_budgets_rounded_each_by_itself_never_exceed_the_total():
    assert adaptive_each([2, 2, 11], 0.2) == [3, 2, 10]  # 2.6, 2.6 and 9.8 would be 3, 3 and 10
    exceeding = 0
    for floor, *hits in itertools.product((0.0, 0.2, 0.37, 0.5, 1.0), range(8), (0, 1, 7, 30), (0, 1, 7, 30)):
        budgets, least = adaptive_each(hits, floor), int(sum(hits) / 3 * floor)
        rounded = [round(hit * (1 - floor) + least) for hit in hits]
        exceeding += sum(rounded) > sum(hits)
        assert budgets == rounded or sum(rounded) > sum(budgets) == sum(hits)
        assert sum(hits) - 1.5 * 3 < sum(budgets) <= sum(hits)
        assert all(least <= budget <= each for budget, each in zip(budgets, rounded, strict=True))
    assert exceeding > 5


@pytest.mark.parametrize(("rounding", "divide"), [("sum", adaptive), ("each", adaptive_each)])
def test_adakv_promises_its_budget_however_it_rounds(tiny, rounding, divide):
    """Two kv heads with 5 tokens each before a window of 3: what is promised is the budget, what is held what was rounded."""
    lm = wb.load((random_llama(2), tiny.tokenizer))
    session, unrounded = (wb.Session(lm, wb.AdaKV(budget=8, window=3, rounding=rounding, floor=floor)) for floor in (0.3, 0.0))
    session.prefill(ids(40)), unrounded.prefill(ids(40))
    last = session.trace.table("cache").query("op == 'evict'").set_index("layer")
    per_token = 2 * 8 * 4  # K and V of 8 float32
    for layer, each in enumerate(session._cache.layers):
        held, whole_hits = ((one._cache.layers[layer].store.positions[0] >= 0).sum(-1) for one in (session, unrounded))
        assert (held - 3).tolist() == divide((whole_hits - 3).tolist(), 0.3)
        assert last["nominal_bytes"][layer] == 2 * 8 * per_token and last["held_tokens"][layer] == each.held_tokens
        assert each.held_tokens == 16 if rounding == "sum" else each.held_tokens < 16


@pytest.mark.parametrize("capacity", [5, 17, 40])
def test_adakv_of_one_floor_is_snapkv_however_it_rounds(capacity):
    state = layer_state(capacity)
    knobs = dict(budget=capacity, window=6, kernel=5, pooling="avg", floor=1.0)
    assert torch.equal(wb.AdaKV(**knobs).keep(state), wb.AdaKV(**knobs, rounding="each").keep(state))


def test_shares_are_rounded_to_their_total():
    assert whole([1.5, 1.5, 1.0], 4) == [2, 1, 1]
    assert whole([2.0, 0.0], 2) == [2, 0]


@pytest.mark.parametrize("capacity", [1, 5, 17, 40])
def test_adakv_with_an_even_floor_is_snapkv(capacity):
    state = layer_state(capacity)
    knobs = dict(budget=capacity, window=6, kernel=5, pooling="avg")
    assert torch.equal(wb.AdaKV(**knobs, floor=1.0).keep(state), wb.SnapKV(**knobs).keep(state))


@pytest.mark.parametrize("capacity", [4, 13, 30])
def test_adakv_gives_equal_heads_equal_budgets(capacity):
    counts = wb.AdaKV(budget=capacity, window=6).keep(layer_state(capacity, alike=True)).sum(-1)
    assert counts.tolist() == [[capacity, capacity]]


@pytest.mark.parametrize("seed", range(5))
def test_adakv_retains_no_less_score_than_snapkv(seed):
    """Without a floor, at the same total."""
    state = layer_state(20, seed=seed)
    windows = torch.tensor([6])
    scores = window_scores(state, windows, "max", 7).masked_fill(recent(state, windows), 0)
    knobs = dict(budget=20, window=6, kernel=7, pooling="max")
    ada, snap = wb.AdaKV(**knobs, floor=0.0).keep(state), wb.SnapKV(**knobs).keep(state)
    assert ada.sum() == snap.sum() == 40
    assert scores[ada].sum() >= scores[snap].sum()
    assert ada[..., -6:].all()


def test_streaming_heads_take_what_whole_heads_leave():
    # 4 heads of 100 tokens, 10 a streaming head, mean 40: 160 - 4 x 10 = 120 is one whole head more, 60 for three others
    assert streaming(160, 4, 100, 10) == (1, [20, 20, 20])
    assert streaming(400, 4, 100, 10) == (4, [])
    assert streaming(399, 4, 100, 10) == (3, [99])
    assert streaming(41, 4, 100, 20) == (0, [11, 10, 10, 10])  # less than sinks and recent tokens
    assert streaming(160, 4, 100, 200) == (0, [40, 40, 40, 40])


def test_streaming_shares_sum_to_the_total_and_fit():
    for total, heads, longest, streamed in itertools.product((1, 7, 50, 333), (1, 2, 8), (1, 9, 100), (1, 4, 60)):
        if heads <= total <= heads * longest:
            num_whole, others = streaming(total, heads, longest, streamed)
            assert num_whole * longest + sum(others) == total and num_whole + len(others) == heads
            assert all(min(streamed, total // heads, longest) <= other <= longest for other in others)


def test_duo_attention_keeps_whole_heads_and_streams_the_rest():
    state = layer_state(30, num_q_heads=8, num_kv_heads=4)
    mask = wb.DuoAttention(budget=30, sinks=3, recent=5, gates="prompt").keep(state)
    counts = mask.sum(-1)[0].tolist()
    # 120 of 200 slots; 120 - 4 x 8 = 88 is two whole heads of 50 - 8 more; 20 are left for two others
    assert sorted(counts) == [10, 10, 50, 50]
    reach = _reach(state)[0]
    assert set(reach.argsort(descending=True)[:2].tolist()) == {head for head, count in enumerate(counts) if count == 50}
    for head, count in enumerate(counts):
        if count == 10:
            assert mask[0, head].nonzero().flatten().tolist() == [0, 1, 2, *range(43, 50)]


def test_duo_attention_without_whole_heads_is_streaming_llm():
    for capacity in (2, 5, 20):
        state = layer_state(capacity)
        duo = wb.DuoAttention(budget=capacity, sinks=4, recent=30, gates="prompt")
        streaming_llm = wb.StreamingLLM(budget=capacity, sinks=4)
        assert torch.equal(duo.keep(state), streaming_llm.keep(state))


def test_reach_is_that_of_a_plain_loop():
    """Mean query and key, rotated to position 499 and to 0 to 499: how early the attention between them falls."""
    state = layer_state(30, length=7)
    frequencies = state.rotation.frequencies.double()

    def turned(vector, position):
        cos, sin = (position * frequencies).cos(), (position * frequencies).sin()
        x, y = vector[:4], vector[4:]
        return torch.cat([x * cos - y * sin, y * cos + x * sin])

    scores = []
    for head in range(4):
        query = sum(turned(state.queries[0, head, t].double(), -t) for t in range(7)) / 7
        key = sum(turned(state.keys[0, head // 2, t].double(), -t) for t in range(7)) / 7
        row = torch.stack([turned(query, 499) @ turned(key, j) for j in range(500)]) * 8**-0.5
        weights = row.exp() / row.exp().sum()
        scores.append(sum(weights[: j + 1].sum() for j in range(500)) / 500)
    expected = [float(scores[0] + scores[1]) / 2, float(scores[2] + scores[3]) / 2]
    assert _reach(state)[0].tolist() == pytest.approx(expected, abs=1e-4)


def test_padding_counts_for_nothing(tiny):
    lm = wb.load((random_llama(4), tiny.tokenizer))
    prompts = [ids(length, seed=length)[0].tolist() for length in (60, 31)]
    together = wb.Session(lm, wb.DuoAttention(budget=0.5, sinks=2, recent=5, gates="prompt"))
    together.prefill(prompts)
    alone = wb.Session(lm, wb.DuoAttention(budget=0.5, sinks=2, recent=5, gates="prompt"))
    alone.prefill(prompts[1])
    for both, one in zip(together._cache.layers, alone._cache.layers, strict=True):
        counts = (both.store.positions[1] >= 0).sum(-1).tolist()
        assert counts == (one.store.positions[0] >= 0).sum(-1).tolist() and len(set(counts)) > 1


@pytest.mark.parametrize("seed", range(6))
def test_dropping_one_token_needs_no_sort_and_drops_the_same(seed):
    """Scores with ties and infinities, empty slots: the lowest, of equal ones the last, as sorting would have it."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (2, 3, 12), generator=generator).float()
    scores[scores == 2] = torch.inf
    occupied = torch.arange(12) >= torch.tensor([0, 4])[:, None, None].expand(2, 3, 1)
    mask = keep_top(scores, torch.tensor([11, 7]), occupied)
    for row, head in itertools.product(range(2), range(3)):
        held = occupied[row, head].nonzero().flatten().tolist()
        lowest = max(held, key=lambda slot: (-scores[row, head, slot].item(), slot))
        assert mask[row, head].nonzero().flatten().tolist() == [slot for slot in held if slot != lowest]
