"""The ragged store: every kv head its own length, whatever is appended and kept, in as much memory as they need together."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import workbench as wb
from workbench.engine.policy import Side
from workbench.engine.stores.ragged import RaggedStore
from workbench.engine.stores.rectangular import SLACK, RectangularStore
from workbench.methods.cache.base import EVERY_STEP
from workbench.testing import ids, random_llama

A_SLOT = 2 * 4 * 4 + 4 + 4
"""Bytes of K and V of 4 float32 each, the position and the mass."""


def append(store, start, count, batch=2, heads=3, dim=4):
    """Keys and values that spell out batch, head and position, so that any mix-up shows."""
    positions = torch.arange(start, start + count, dtype=torch.int32).expand(batch, count)
    code = torch.arange(batch)[:, None, None] * 1e4 + torch.arange(heads)[:, None] * 1e3 + positions[:, None]
    keys = code[..., None].expand(-1, -1, -1, dim).contiguous()
    store.append(keys, -keys, positions, has_padding=False)
    mass = store.side["mass"]
    mass[..., -count:] = code
    store.put_side("mass", mass)
    if "row" in store.declared:
        store.put_side("row", torch.stack([mass, -mass], -1))


def filled(length=20, **side) -> RaggedStore:
    store = RectangularStore({"mass": Side(), **side})
    append(store, 0, length)
    return RaggedStore.of(store)


def check(store):
    code = torch.arange(2)[:, None, None] * 1e4 + torch.arange(3)[:, None] * 1e3
    positions = store.positions
    held = positions >= 0
    assert store.occupied is None or torch.equal(store.occupied, held)
    assert torch.equal((store.keys[..., 0] - code)[held], positions[held].float())
    assert torch.equal(store.values[held], -store.keys[held])
    assert torch.equal(store.side["mass"][held], store.keys[..., 0][held])
    if "row" in store.declared:
        assert torch.equal(store.side["row"][held], torch.stack([store.keys[..., 0], -store.keys[..., 0]], -1)[held])
    assert store.held_tokens() == int(held.sum())
    assert store.held_by_row() == held.sum(-1).amax(1).tolist() and store.total_by_row() == held.sum((1, 2)).tolist()


def sets(store):
    return [[sorted(set(head.tolist()) - {-1}) for head in row] for row in store.positions]


@pytest.mark.parametrize("share", [0.9, 0.5], ids=["few-dropped", "many-dropped"])
@pytest.mark.parametrize("seed", range(4))
def test_random_life(seed, share):
    """Appends and evictions in random order, against a set of positions per head; a clone and a padded copy agree."""
    generator = torch.Generator().manual_seed(seed)
    store = filled(row=Side(shape=(2,)))
    expected, seen = sets(store), 20
    for _ in range(12):
        count = int(torch.randint(1, 4, (1,), generator=generator))
        append(store, seen, count)
        expected = [[[*head, *range(seen, seen + count)] for head in row] for row in expected]
        seen += count
        if torch.rand(1, generator=generator) < 0.7:
            positions = store.positions
            keep = (torch.rand(positions.shape, generator=generator) < share) & (positions >= 0)
            expected = [[sorted(positions[row, head][keep[row, head]].tolist()) for head in range(3)] for row in range(2)]
            store.keep(keep)
        check(store)
        assert sets(store) == expected
        check(store.rectangular())
        assert sets(store.rectangular()) == expected
    copied = store.clone()
    append(copied, seen, 1)
    assert sets(store) == expected
    store.sort()
    check(store)
    assert all(torch.equal(row, row.sort().values) for row in store.positions.flatten(0, 1))


def test_memory_is_that_of_the_lengths_and_not_of_the_fullest_head():
    store = filled(length=1000)
    keep = torch.zeros(2, 3, 1000, dtype=torch.bool)
    for head, count in enumerate((700, 10, 10)):
        keep[:, head, :count] = True
    moved = store.keep(keep)
    assert moved == 2 * 2 * 720 * A_SLOT
    assert store.nbytes == 2 * (720 + 3 * (240 // 16)) * A_SLOT
    check(store)


def test_dropping_one_token_moves_one_token_and_appending_reallocates_seldom():
    store = filled(length=100)
    keep = torch.ones(2, 3, 100, dtype=torch.bool)
    keep[1, 2, 30:] = False
    store.keep(keep)
    append(store, 100, 1)
    keep = store.positions >= 0
    keep[0, 1, 5] = False
    address, moved = store.flat[0].data_ptr(), store.keep(keep)
    assert moved == 2 * A_SLOT and store.flat[0].data_ptr() == address
    addresses = set()
    for position in range(101, 400):
        append(store, position, 1)
        addresses.add(store.flat[0].data_ptr())
    assert len(addresses) < 40 and store.nbytes <= 1.1 * (5 * 400 + 330) * A_SLOT
    check(store)


class EveryStep(wb.METHODS["adakv"]):
    """AdaKV that goes on deciding while it decodes, so that heads trade tokens at every step."""

    acts = EVERY_STEP


@pytest.fixture(params=[1, 2, 4], ids=["MQA", "GQA", "MHA"])
def lm(request, tiny) -> wb.LM:
    return wb.load((random_llama(request.param), tiny.tokenizer))


def test_a_session_far_longer_than_its_budget_stays_flat(tiny):
    """4,000 decoded tokens through a store: the budget holds and memory never passes budget and reserve."""
    generator = torch.Generator().manual_seed(0)
    store, mass = RectangularStore(), 60
    store.append(torch.zeros(1, 2, mass, 4), torch.zeros(1, 2, mass, 4), torch.arange(mass, dtype=torch.int32)[None], False)
    store = RaggedStore.of(store)
    most = 0
    for position in range(mass, mass + 4000):
        token = torch.zeros(1, 2, 1, 4)
        store.append(token, token, torch.tensor([[position]], dtype=torch.int32), False)
        scores = torch.rand(store.positions.shape, generator=generator) * torch.tensor([[[1.0], [1 + position / 1e3]]])
        scores[store.positions < 0] = -1
        best = scores.flatten().topk(2 * mass).values.min()
        store.keep(scores >= best)
        most = max(most, store.nbytes)
        assert store.held_tokens() == 2 * mass
    assert store.positions.max() == 4059 and max(store.held_by_row()) > 1.2 * mass
    assert most <= (2 * mass + 4 * SLACK) * (A_SLOT - 4)


def test_a_decoding_session_stays_flat(tiny):
    lm = wb.load((random_llama(2), tiny.tokenizer))
    session = wb.Session(lm, EveryStep(budget=24, window=4, floor=0.0))
    session.prefill(ids(60)[0].tolist())
    sizes = set()
    for token in ids(300, seed=3)[0].tolist():
        session.step([token])
        assert all(layer.store.held_tokens() == 2 * 24 for layer in session._cache.layers)
        sizes.add(session.physical_bytes)
    assert max(sizes) <= 3 * (2 * 24 + 4 * SLACK) * (2 * 8 * 4 + 4)
    assert any(len(set(layer.store._lengths)) > 1 for layer in session._cache.layers)


@pytest.mark.parametrize("importance", ["off", "window"])
def test_several_turns_equal_a_rectangular_store_with_the_same_holes(lm, importance):
    """A batch with padding, appended turns and decoded tokens: the flattened store and the padded one give the same logits."""
    rows = [ids(length, seed=length)[0].tolist() for length in (40, 23)]
    ragged = wb.Session(lm, wb.AdaKV(budget=0.4, window=8), importance=importance)
    ragged.prefill(rows)
    padded = ragged.branch()
    for layer in padded._cache.layers:
        layer.store = layer.store.rectangular()
    for turn in ([[3, 4, 5]] * 2, [[7]] * 2, [[8]] * 2, [[9, 10]] * 2, [[11]] * 2):
        torch.testing.assert_close(ragged.append(turn), padded.append(turn), atol=1e-5, rtol=1e-5)
    assert all(isinstance(layer.store, RaggedStore) for layer in ragged._cache.layers)
    assert [layer.store.held_tokens() for layer in ragged._cache.layers] == [
        layer.store.held_tokens() for layer in padded._cache.layers
    ]
    if importance == "window":
        mine, theirs = (session.trace.table("importance")["mass"] for session in (ragged, padded))
        assert all(abs(a - b).max() < 1e-3 for a, b in zip(mine.iloc[-8:], theirs.iloc[-8:], strict=True))


def test_bytes_allocated_are_those_of_the_lengths(lm):
    session = wb.Session(lm, wb.AdaKV(budget=0.25, window=8, floor=0.0))
    session.prefill(ids(400)[0].tolist())
    heads = lm.anatomy.layers[0].attention.num_kv_heads
    for layer in session._cache.layers:
        assert layer.store.nbytes == heads * (100 + SLACK) * (2 * 8 * 4 + 4)
    recorded = session.trace.table("cache").query("op == 'evict'")
    assert recorded["physical_bytes"].tolist() == [layer.store.nbytes for layer in session._cache.layers]


def test_swapping_between_ragged_and_rectangular_methods(lm):
    """Each way and back; what is held only shrinks, and a branch goes its own way."""
    session = wb.Session(lm, wb.AdaKV(budget=0.8, window=8))
    session.prefill(ids(40)[0].tolist())
    heads = lm.anatomy.layers[0].attention.num_kv_heads
    for method, held in [
        (wb.H2O(budget=20), 20),
        (wb.AdaKV(budget=18, window=8), 18),
        (wb.EMS(budget=16, window=2, tau=-1.0, eps=0.0, head_adaptive=True), 16),
        (None, 17),
        (wb.KNorm(budget=8), 8),
        (EveryStep(budget=6, window=2), 6),
        (wb.DuoAttention(budget=5, sinks=1, recent=2, gates="prompt"), 5),
    ]:
        before = [sets(layer.store) for layer in session._cache.layers]
        newest = len(session.tokens[0])
        session.swap(method)
        fork = session.branch()
        session.step()
        for layer, old in zip(session._cache.layers, before, strict=True):
            assert heads <= layer.store.held_tokens() <= held * heads  # a head cannot get back what it has lost
            assert isinstance(layer.store, RaggedStore) or method is None or not method.ragged
            for now, then in zip(sets(layer.store)[0], old[0], strict=True):
                assert set(now) <= {*then, newest}
        assert torch.equal(fork.step(), session.logits)


def test_flops_and_bytes_of_a_step_are_those_of_the_mean_length(tiny):
    lm = wb.load((random_llama(4), tiny.tokenizer))
    traces = []
    for method in (wb.AdaKV(budget=16, window=8, floor=0.0), wb.SnapKV(budget=16, window=8)):
        session = wb.Session(lm, method)
        session.prefill(ids(40)[0].tolist())
        session.generate(5, stop_at_end=False)
        traces.append(session.trace)
    ragged, even = (trace.table("attention").query("step > 0") for trace in traces)
    assert set(ragged["kernel"]) == {"ragged"} and ragged["kv_read"].tolist() == even["kv_read"].tolist()
    assert traces[0].flops() == traces[1].flops()
    assert traces[0].bytes(model="eager") > 0 and dataclasses.is_dataclass(wb.AdaKV)


def test_side_state_of_any_kind_moves_with_its_token():
    store = RectangularStore({"step": Side(torch.int32, -1)})
    positions = torch.arange(6, dtype=torch.int32)[None]
    keys = torch.arange(6.0).expand(1, 2, 6)[..., None].contiguous()
    store.append(keys, keys.clone(), positions, has_padding=False)
    store = RaggedStore.of(store)
    store.put_side("step", 10 * store.positions)
    store.keep(torch.tensor([[[True, False, True, True, True, True], [False, False, False, False, True, False]]]))
    store.append(keys[:, :, :1] + 6, keys[:, :, :1] + 6, positions[:, :1] + 6, has_padding=False)
    held = store.positions >= 0
    expected = torch.where(store.positions == 6, -1, 10 * store.positions)
    assert store.side["step"].dtype == torch.int32 and torch.equal(store.side["step"][held], expected[held])
    assert torch.equal(store.rectangular().side["step"][held], expected[held])
    before = store.nbytes
    store.replace_side({"mass": Side(), "count": Side(torch.int64, 7)})
    assert store.nbytes == before + (before // (4 + 4 + 4 + 4)) * 8 and (store.side["count"][held] == 7).all()
