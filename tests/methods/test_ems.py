"""EMS: the sheet's properties, a merge against a plain loop, and what the trace says of it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import workbench as wb
from workbench.engine.policy import LayerState
from workbench.methods.cache.budgets import in_proportion
from workbench.methods.cache.ems import _absorbed, spreads
from workbench.testing import ids, random_llama


def state(capacity: int, num_heads: int = 2, length: int = 40, dim: int = 6, seed: int = 0) -> LayerState:
    """Two query heads a kv head; keys and values lie close to a few directions, so that many are alike."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(2, 5, dim, generator=generator)
    kinds = torch.randint(0, 5, (1, num_heads, length), generator=generator)
    keys, values = centres[:, kinds] + 0.3 * torch.randn(2, 1, num_heads, length, dim, generator=generator)
    queries = torch.randn(1, 2 * num_heads, length, dim, generator=generator)
    positions = torch.arange(length).expand(1, num_heads, length)
    scores = queries.view(1, num_heads, 2, length, dim) @ keys[:, :, None].transpose(-1, -2) / math.sqrt(dim)
    hidden = torch.ones(length, length, dtype=torch.bool).triu(1)
    mass = scores.masked_fill(hidden, -math.inf).softmax(-1).sum((2, 3))
    return LayerState(keys, values, positions, torch.tensor([capacity]), dim**-0.5, 0, 1, "prefill", queries, mass)


def plain_scores(state: LayerState, head: int, window: int) -> list[float]:
    """Mean over the two query heads of local and exposure-normalised global attention, brought to one mean."""
    length = state.keys.shape[2]
    local, overall = [0.0] * length, [0.0] * length
    for query_head in (2 * head, 2 * head + 1):
        for i in range(length):
            dots = [float(state.queries[0, query_head, i] @ state.keys[0, head, j]) * state.scaling for j in range(i + 1)]
            weights = [math.exp(dot) for dot in dots]
            for j, weight in enumerate(weights):
                share = weight / sum(weights)
                overall[j] += share / (length - j) / 2
                local[j] += share / window / 2 if i >= length - window else 0
    return [o * sum(local) / sum(overall) + near for o, near in zip(overall, local, strict=True)]


def cosine(a, b):
    return float(a @ b / a.norm() / b.norm())


@pytest.mark.parametrize("clamp_negative", [False, True])
@pytest.mark.parametrize("merge_keys", ["none", "directions"])
@pytest.mark.parametrize(("tau", "eps"), [(0.6, 0.1), (0.0, 0.0), (-1.0, 0.9), (1.5, 0.1)])
def test_kept_sets_and_merges_equal_a_plain_loop(tau, eps, merge_keys, clamp_negative):
    seen = state(capacity=14)
    method = wb.EMS(budget=14, window=4, sinks=2, tau=tau, eps=eps, merge_keys=merge_keys, clamp_negative=clamp_negative)
    keep = method.keep(seen)
    merged = method.merge(seen, keep)
    num_merged = 0
    for head in range(2):
        scores = plain_scores(seen, head, 4)
        always = {0, 1, 36, 37, 38, 39}
        centres = sorted(set(range(40)) - always, key=lambda j: -scores[j])[:8]
        assert set(keep[0, head].nonzero().flatten().tolist()) == always | set(centres)
        k, v = seen.keys[0, head], seen.values[0, head]
        into = {}
        for j in set(range(40)) - always - set(centres):
            likeness = {}
            for c in centres:
                both = cosine(k[j], k[c]), cosine(v[j], v[c])
                likeness[c] = math.prod(max(each, 0) for each in both) if clamp_negative else math.prod(both)
            best = max(likeness, key=lambda c: likeness[c])
            if scores[j] >= eps * sum(scores) / 40 and likeness[best] >= tau:
                into[j] = best
        assert {j: c for j, c in enumerate(merged.into[0, head].tolist()) if c >= 0} == into
        num_merged += len(into)
        for slot in always | set(centres):
            members = [slot, *(j for j, c in into.items() if c == slot)]
            total = sum(scores[j] for j in members)
            value = sum(scores[j] / total * v[j] for j in members)
            torch.testing.assert_close(merged.values[0, head, slot], value, atol=1e-5, rtol=1e-4)
            key = k[slot]
            if merge_keys == "directions" and len(members) > 1:
                direction = sum(scores[j] * k[j] / k[j].norm() for j in members)
                key = direction / direction.norm() * k[slot].norm()
            torch.testing.assert_close(merged.keys[0, head, slot], key, atol=1e-5, rtol=1e-4)
    assert (num_merged == 0) == (tau > 1)


def test_duplicates_merge_into_one_centre_whose_value_is_unchanged():
    seen = state(capacity=12, num_heads=1)
    seen.keys[0, 0, 5:30] = 2 * seen.keys[0, 0, 5]
    seen.values[0, 0, 5:30] = seen.values[0, 0, 5]
    method = wb.EMS(budget=12, window=2, sinks=1, eps=0.0, merge_keys="directions")
    keep = method.keep(seen)
    merged = method.merge(seen, keep)
    duplicates = [slot for slot in range(5, 30) if keep[0, 0, slot]]
    gone = [slot for slot in range(5, 30) if not keep[0, 0, slot]]
    assert duplicates and gone and all(merged.into[0, 0, slot] in range(5, 30) for slot in gone)
    for slot in duplicates:
        alike = [j for j in range(40) if merged.into[0, 0, j] == slot]
        if set(alike) <= set(range(5, 30)):
            torch.testing.assert_close(merged.values[0, 0, slot], seen.values[0, 0, slot])
            torch.testing.assert_close(merged.keys[0, 0, slot], seen.keys[0, 0, slot])


def test_equal_weights_give_the_plain_mean(monkeypatch):
    seen = state(capacity=10)
    method = wb.EMS(budget=10, window=2, sinks=2, tau=-1.0, eps=0.0)
    monkeypatch.setattr(wb.EMS, "_scores", lambda self, state: torch.ones(state.positions.shape))
    keep = method.keep(seen)
    merged = method.merge(seen, keep)
    for head in range(2):
        for slot in keep[0, head].nonzero().flatten().tolist():
            members = [slot, *(merged.into[0, head] == slot).nonzero().flatten().tolist()]
            torch.testing.assert_close(merged.values[0, head, slot], seen.values[0, head, members].mean(0))


def test_nothing_that_goes_into_no_centre_changes_what_stays():
    """The extra row that takes what is unlike all centres is dropped: whatever goes into it, centres stay as they are."""
    torch.manual_seed(0)
    states, weights = torch.randn(1, 2, 9, 3), torch.rand(1, 2, 9)
    slots = torch.tensor([[[1, 4], [0, 8]]])
    nearest = torch.full((1, 2, 9), 2)
    assert torch.allclose(_absorbed(states, weights, slots, nearest), states)
    nearest[0, 0, 5] = 1
    absorbed = _absorbed(states, weights, slots, nearest)
    others = torch.where((nearest == 2)[..., None] & ~torch.isin(torch.arange(9), slots)[:, None], 7.0, states)
    again = _absorbed(others, weights, slots, nearest)
    index = slots[..., None].expand(-1, -1, -1, 3)
    assert torch.equal(absorbed.gather(2, index), again.gather(2, index))
    assert not torch.allclose(absorbed[0, 0, 4], states[0, 0, 4])
    torch.testing.assert_close(absorbed[0, 0, 1], states[0, 0, 1])
    torch.testing.assert_close(absorbed[0, 1], states[0, 1])


@pytest.mark.parametrize("merge_keys", ["none", "directions"])
def test_every_head_holds_its_budget_and_the_trace_says_what_went_where(tiny, merge_keys):
    lm = wb.load((random_llama(), tiny.tokenizer))
    method = wb.EMS(budget=12, window=4, tau=-1.0, eps=0.0, merge_keys=merge_keys)
    session = wb.Session(lm, method)
    session.prefill(ids(40)[0].tolist())
    evictions = session.trace.table("evictions")
    assert len(evictions) == 3 * 2 * 28 and (evictions["into"] >= 0).all()
    for layer in session._cache.layers:
        assert layer.store.length == 12 and not layer.store.has_empty_slots
        for head in range(2):
            held = set(layer.store.positions[0, head].tolist())
            mine = evictions.query(f"layer == {layer.index} and head == {head}")
            assert set(mine["into"]) <= held and not held & set(mine["position"])
    pure = wb.Session(lm, dataclasses.replace(method, tau=2.0))
    pure.prefill(ids(40)[0].tolist())
    assert (pure.trace.table("evictions")["into"] == -1).all()
    for merged, plain in zip(session._cache.layers, pure._cache.layers, strict=True):
        if merged.index == 0:
            assert torch.equal(merged.store.positions, plain.store.positions)
            assert not torch.equal(merged.store.values, plain.store.values)
            assert torch.equal(merged.store.keys, plain.store.keys) == (merge_keys == "none")
    assert not torch.allclose(session.step([5]), pure.step([5]))


def test_room_is_shared_in_proportion_and_never_wasted():
    assert in_proportion([3, 1], [100, 100], 40) == [30, 10]
    # 36 are too many for the first by 16, which the others share 2 to 1: 8 + 10 2/3 and 4 + 5 1/3
    assert in_proportion([6, 2, 1], [20, 100, 100], 54) == [20, 23, 11]
    assert in_proportion([1, 1], [3, 4], 9) == [3, 4] and in_proportion([5, 1], [0, 9], 4) == [0, 4]
    assert in_proportion([1, 1, 1], [9, 9, 9], 10) == [4, 3, 3] and in_proportion([2, 1], [4, 4], 0) == [0, 0]
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        wants, rooms = (torch.randint(low, 30, (4,), generator=generator).tolist() for low in (1, 0))
        for total in (1, 7, 40, 200):
            shares = in_proportion(wants, rooms, total)
            assert sum(shares) == min(total, sum(rooms)) and all(s <= room for s, room in zip(shares, rooms, strict=True))
            for a, b in ((0, 1), (1, 2), (2, 3)):  # who wants more gets no less, if there is room
                if wants[a] >= wants[b] and shares[a] < rooms[a]:
                    assert shares[a] >= shares[b] - 1


def test_the_tokens_that_hold_most_of_the_scores_are_counted():
    scores = torch.tensor([[[0.5, 0.0, 0.5, 0.0], [0.25, 0.25, 0.25, 0.25], [0.92, 0.02, 0.03, 0.03]]])
    assert spreads(scores).tolist() == [[2, 4, 1]]


def test_spread_heads_keep_more_and_all_heads_as_much_in_sum():
    """Head 0's queries look at one key; head 1's look nowhere in particular."""
    seen = state(capacity=14)
    queries = seen.queries.clone()
    queries[0, :2] = 9 * seen.keys[0, 0, 7]
    queries[0, 2:] = 0
    scores = queries.view(1, 2, 2, 40, 6) @ seen.keys[:, :, None].transpose(-1, -2) * seen.scaling
    hidden = torch.ones(40, 40, dtype=torch.bool).triu(1)
    mass = scores.masked_fill(hidden, -math.inf).softmax(-1).sum((2, 3))
    seen = dataclasses.replace(seen, queries=queries, mass=mass)
    method = wb.EMS(budget=14, window=4, sinks=2, tau=-1.0, eps=0.0, head_adaptive=True)
    keep = method.keep(seen)
    needed = []
    for head in range(2):
        ordered = sorted(plain_scores(seen, head, 4), reverse=True)
        needed.append(next(n for n in range(1, 41) if sum(ordered[:n]) >= 0.9 * sum(ordered)))
    # 14 a head, of which 6 are sinks and recent tokens: 16 are shared
    counts = [6 + each for each in in_proportion(needed, [34, 34], 16)]
    assert needed[0] < needed[1] / 4 and keep.sum(-1).tolist() == [counts] and sum(counts) == 28 and counts[0] >= 6
    for head in range(2):
        always = {0, 1, 36, 37, 38, 39}
        scores = plain_scores(seen, head, 4)
        best = sorted(set(range(40)) - always, key=lambda j: -scores[j])[: counts[head] - 6]
        assert set(keep[0, head].nonzero().flatten().tolist()) == always | set(best)
    into = method.merge(seen, keep).into
    assert ((into >= 0) == ~keep)[0, 1].all()  # each goes into one of the head's own centres
    for head in range(2):
        went = into[0, head][into[0, head] >= 0]
        assert keep[0, head][went].all()


def test_adaptive_heads_are_stored_at_their_own_lengths(tiny):
    method = wb.EMS(budget=0.3, window=4, tau=-1.0, eps=0.0, head_adaptive=True)
    together, rows = wb.Session(tiny, method), [ids(length, seed=length)[0].tolist() for length in (40, 23)]
    together.prefill(rows)
    both, lengths = together.branch().step([5, 5]), set()
    for row, prompt in enumerate(rows):
        alone = wb.Session(tiny, method)
        alone.prefill(prompt)
        for ours, theirs in zip(together._cache.layers, alone._cache.layers, strict=True):
            held = (theirs.store.positions[0] >= 0).sum(-1)
            assert held.sum() == theirs.store.held_tokens() == 2 * round(0.3 * len(prompt))
            lengths.add(tuple(held.tolist()))
            for head in range(2):
                sets = [set(store.positions[at, head].tolist()) - {-1} for store, at in ((ours.store, row), (theirs.store, 0))]
                assert sets[0] == sets[1]
        torch.testing.assert_close(both[row], alone.step([5])[0], atol=1e-4, rtol=1e-4)
    assert any(first != second for first, second in lengths)
