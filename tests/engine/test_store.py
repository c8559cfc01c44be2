"""The rectangular store: whatever is appended and kept, K, V and side state stay with their positions."""

from __future__ import annotations

import pytest
import torch

from workbench.engine.policy import Side
from workbench.engine.stores.rectangular import SLACK, RectangularStore


def filled(batch=2, heads=3, length=20, dim=4, **side) -> RectangularStore:
    store = RectangularStore({"mass": Side(), **side})
    append(store, 0, length, batch, heads, dim)
    return store


def append(store, start, count, batch=2, heads=3, dim=4):
    """Keys and values that spell out batch, head and position, so that any mix-up shows."""
    positions = torch.arange(start, start + count, dtype=torch.int32).expand(batch, count)
    code = torch.arange(batch)[:, None, None] * 1e4 + torch.arange(heads)[:, None] * 1e3 + positions[:, None]
    keys = code[..., None].expand(-1, -1, -1, dim).contiguous()
    store.append(keys, -keys, positions, has_padding=False)
    store.side["mass"][..., -count:] = code
    if "row" in store.declared:
        store.side["row"][:, :, -count:] = torch.stack([code, -code], -1)


def check(store):
    code = torch.arange(store.keys.shape[0])[:, None, None] * 1e4 + torch.arange(store.keys.shape[1])[:, None] * 1e3
    held = store.positions >= 0
    assert torch.equal((store.keys[..., 0] - code)[held], store.positions[held].float())
    assert torch.equal(store.values, -store.keys)
    assert torch.equal(store.side["mass"][held], store.keys[..., 0][held])
    if "row" in store.declared:
        assert torch.equal(store.side["row"][held], torch.stack([store.keys[..., 0], store.values[..., 0]], -1)[held])


@pytest.mark.parametrize("seed", range(8))
def test_random_life(seed):
    """Appends and evictions in random order, uneven heads and rows included, against a set of positions per head."""
    generator = torch.Generator().manual_seed(seed)
    store = filled(row=Side(shape=(2,)))
    expected = [[set(range(20)) for _ in range(3)] for _ in range(2)]
    seen = 20
    for _ in range(12):
        count = int(torch.randint(1, 4, (1,), generator=generator))
        append(store, seen, count)
        for row in expected:
            for head in row:
                head |= set(range(seen, seen + count))
        seen += count
        if torch.rand(1, generator=generator) < 0.7:
            keep = (torch.rand(store.positions.shape, generator=generator) < 0.8) & (store.positions >= 0)
            for row in range(2):
                for head in range(3):
                    expected[row][head] = set(store.positions[row, head][keep[row, head]].tolist())
            store.keep(keep)
        check(store)
        for row in range(2):
            for head in range(3):
                held = store.positions[row, head]
                assert sorted(held[held >= 0].tolist()) == sorted(expected[row][head])


def test_dropping_one_token_moves_one_token():
    store = filled()
    keep = torch.ones(2, 3, 20, dtype=torch.bool)
    keep[:, :, 5] = False
    moved = store.keep(keep)
    assert store.length == 19 and not store.has_empty_slots
    # in and out: 6 heads x (K 4 + V 4 float32, position int32, mass float32)
    assert moved == 2 * 6 * (8 * 4 + 4 + 4)
    check(store)


def test_eviction_frees_memory():
    store = filled(length=1000)
    before = store.nbytes
    keep = torch.zeros(2, 3, 1000, dtype=torch.bool)
    keep[:, :, :100] = True
    store.keep(keep)
    assert store.nbytes == before * (100 + max(SLACK, 100 // 16)) // 1000


def test_appending_reallocates_seldom():
    store = filled(length=100)
    buffers = set()
    for position in range(100, 400):
        append(store, position, 1)
        buffers.add(store._buffers["keys"].data_ptr())
    assert len(buffers) < 30
    assert store.nbytes <= 1.1 * 400 * 2 * 3 * (8 * 4 + 8)


def test_sliding_window_keeps_the_last_slots():
    store = RectangularStore()
    positions = torch.arange(50, dtype=torch.int32)[None]
    store.append(torch.zeros(1, 1, 50, 2), torch.zeros(1, 1, 50, 2), positions, has_padding=False)
    store.keep_last(15)
    for position in range(50, 120):
        store.append(
            torch.zeros(1, 1, 1, 2), torch.zeros(1, 1, 1, 2), torch.tensor([[position]], dtype=torch.int32), has_padding=False
        )
        store.keep_last(15)
        assert store.positions[0, 0, -15:].tolist() == list(range(position - 14, position + 1))
        assert store.length <= 15 + SLACK


def test_clone_is_independent():
    store = filled()
    other = store.clone()
    append(other, 20, 1)
    other.keep(torch.zeros_like(other.positions, dtype=torch.bool).index_fill(2, torch.tensor([0]), True))
    assert store.length == 20 and other.length == 1
    check(store)


def test_sorting_puts_slots_in_the_order_of_the_text():
    store = RectangularStore({"mass": Side()})
    positions = torch.arange(6, dtype=torch.int32)[None]
    keys = torch.arange(6.0).view(1, 1, 6, 1)
    store.append(keys, keys.clone(), positions, has_padding=False)
    store.keep((positions != 1)[None])  # the last token moves into the hole
    assert store.positions.flatten().tolist() == [0, 5, 2, 3, 4]
    store.sort()
    assert (
        store.positions.flatten().tolist()
        == store.keys.flatten().tolist()
        == store.values.flatten().tolist()
        == [0, 2, 3, 4, 5]
    )


def test_stores_given_the_same_positions_do_not_share_them():
    """All layers are given the call's positions; with one row and one kv head nothing would need a copy."""
    positions = torch.arange(5, dtype=torch.int32)[None]
    stores = [RectangularStore(), RectangularStore()]
    for store in stores:
        store.append(torch.zeros(1, 1, 5, 2), torch.zeros(1, 1, 5, 2), positions, has_padding=False)
    stores[0].keep(torch.tensor([[[False, True, True, True, True]]]))
    assert stores[1].positions.flatten().tolist() == [0, 1, 2, 3, 4]


def test_side_state_of_any_kind_moves_with_its_token_and_is_freed():
    store = RectangularStore({"step": Side(torch.int32, -1), "mass": Side()})
    positions = torch.arange(6, dtype=torch.int32)[None]
    keys = torch.arange(6.0).view(1, 1, 6, 1)
    store.append(keys, keys.clone(), positions, has_padding=False)
    assert store.side["step"].dtype == torch.int32 and (store.side["step"] == -1).all() and (store.side["mass"] == 0).all()
    store.side["step"].copy_(positions)
    store.side["mass"].copy_(positions)
    other = store.clone()
    store.keep((positions != 1)[None])
    store.append(keys[:, :, :1] + 6, keys[:, :, :1] + 6, positions[:, :1] + 6, has_padding=False)
    assert store.side["step"].flatten().tolist() == [0, 5, 2, 3, 4, -1]
    assert other.side["step"].flatten().tolist() == [0, 1, 2, 3, 4, 5]
    before = store.nbytes
    slots = store._buffers["keys"].shape[2]
    store.replace_side({"mass": Side(), "count": Side(torch.int64, 7)})
    assert store.side.keys() == {"mass", "count"} and store.nbytes == before + slots * (8 - 4)
    assert store.side["mass"].flatten().tolist() == [0, 5, 2, 3, 4, 0] and store.side["count"].flatten().tolist() == [7] * 6
    store.replace_side({"count": Side(torch.int64, 9)})  # only the mass means the same to every method
    assert store.side["count"].flatten().tolist() == [9] * 6


def test_side_state_may_change_before_the_prompt():
    store = RectangularStore({"step": Side(torch.int32)})
    store.replace_side({"mass": Side()})
    append(store, 0, 4)
    check(store)
    assert store.side.keys() == {"mass"}
