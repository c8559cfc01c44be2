"""PrefixKV: the sheet's worked examples, the solver's properties, and the fixed slot of decoding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.engine.policy import LayerState
from workbench.methods.cache.budgets import prefix_drops
from workbench.testing import ids, random_llama

STEEP = np.array([0.70, 0.10, 0.05, 0.05, 0.04, 0.03, 0.02, 0.01])
FLAT = np.array([0.20, 0.18, 0.16, 0.14, 0.12, 0.10, 0.06, 0.04])


def shares(budget: int, *layers: np.ndarray, sinks: int = 0) -> list[int]:
    """What `share` gives layers of one row that report so."""
    reports = [torch.tensor(layer, dtype=torch.float32)[None] for layer in layers]
    method = wb.PrefixKV(budget=budget, sinks=sinks)
    return [row[0] for row in method.share(reports, [[len(layer)] for layer in layers], [len(layers[0])], len(layers))]


def test_worked_example_of_the_solver():
    """p = .79 drops [6, 3], p = .81 drops [5, 2], 8 cannot be met; 8/9 of [6, 3], truncated, is [5, 2]."""
    assert prefix_drops([STEEP, FLAT], 0, 9) == [6, 3]
    assert prefix_drops([STEEP, FLAT], 0, 7) == [5, 2]
    assert prefix_drops([STEEP, FLAT], 0, 8) == [5, 2]
    kept = [8 - 6, 8 - 3]  # the same share of each layer's importance, before the rescaling
    assert STEEP[: kept[0]].sum() >= 0.79 and FLAT[: kept[1]].sum() >= 0.79


def test_what_truncation_leaves_over_is_dropped_from_the_layer_that_holds_most():
    # One token a layer is protected. p = .8 drops [5, 2] and p = .81 [4, 1], 7 and 5 where 6 must go: 6/7 of the first are
    # [4, 1], truncated. Of [4, 7] left, the second layer drops one more.
    assert prefix_drops([STEEP, FLAT], 1, 7) == [5, 2] and prefix_drops([STEEP, FLAT], 1, 5) == [4, 1]
    assert prefix_drops([STEEP, FLAT], 1, 6) == [4, 1]
    assert shares(5, STEEP, FLAT) == [4, 6]


def test_equal_layers_get_uniform_shares():
    for budget in range(1, 8):
        assert shares(budget, FLAT, FLAT, FLAT, sinks=2) == [budget] * 3


@pytest.mark.parametrize("seed", range(5))
def test_a_flatter_layer_keeps_no_fewer_tokens_and_the_sum_is_met(seed):
    generator = np.random.default_rng(seed)
    length, num_layers = 97, 6
    powers = np.sort(generator.uniform(0.1, 3, num_layers))  # the flattest layer first
    layers = [np.arange(1, length + 1) ** -power for power in powers]
    for target in (0, 1, 50, 200, 400, num_layers * (length - 6)):
        drops = prefix_drops(layers, 5, target)
        assert drops == sorted(drops) and sum(drops) <= max(target, 0) and min(drops) >= 0
    for budget in (1, 3, 7, 40, 90, 97):
        kept = shares(budget, *layers, sinks=4)
        assert sum(kept) == budget * num_layers and max(kept) <= length and min(kept) >= min(budget, 5)


def state(mass, share, capacity=None, positions=None, dividing=True) -> LayerState:
    """One row, two kv heads."""
    mass = torch.tensor(mass, dtype=torch.float32).expand(1, 2, -1)
    keys = torch.zeros(1, 2, mass.shape[2], 2)
    positions = torch.arange(mass.shape[2]) if positions is None else torch.tensor(positions)
    share, capacity = torch.tensor([share]), torch.tensor([share if capacity is None else capacity])
    positions = positions.expand(1, 2, -1)
    return LayerState(keys, keys, positions, capacity, 1.0, 0, 1, "decode", None, mass, share=share, dividing=dividing)


def test_heads_share_one_set_with_the_sinks_and_the_newest():
    seen = state([0.1, 0.2, 9.0, 0.3, 8.0, 0.4, 7.0, 0.05], share=5)
    mass = seen.mass.clone()
    mass[0, 1] = torch.tensor([0, 0, 0, 20.0, 0, 0, 0, 0])  # the other head's favourite counts as much
    mask = wb.PrefixKV(sinks=2).keep(LayerState(**{**vars(seen), "mass": mass}))
    assert mask[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 7] and torch.equal(mask[0, 0], mask[0, 1])


def test_while_decoding_the_token_at_a_fixed_slot_goes():
    # A share of 6 and a tail of 2: slot 4 in the order of the text, whatever the order in memory.
    seen = state([0.0] * 7, share=6, capacity=6, positions=[0, 9, 2, 3, 4, 5, 8], dividing=False)
    mask = wb.PrefixKV(tail=2).keep(seen)
    assert seen.positions[0, 0][~mask[0, 0]].tolist() == [5]
    # With an appended turn several tokens pass it at once; a tail longer than the share leaves its middle.
    seen = state([0.0] * 9, share=6, capacity=6, dividing=False)
    assert wb.PrefixKV(tail=2).keep(seen)[0, 0].logical_not().nonzero().flatten().tolist() == [4, 5, 6]
    assert wb.PrefixKV(tail=25).keep(seen)[0, 0].logical_not().nonzero().flatten().tolist() == [3, 4, 5]


def test_layers_keep_their_ratio_while_they_decode(tiny):
    session = wb.Session(tiny, wb.PrefixKV(budget=0.4, tail=4))
    session.prefill(ids(60)[0].tolist())
    start = [layer.store.length for layer in session._cache.layers]
    prompt = [sorted(layer.store.positions[0, 0].tolist()) for layer in session._cache.layers]
    assert sum(start) == 4 * 24 and len(set(start)) > 1
    session.generate(40, stop_at_end=False)
    for layer, share, before in zip(session._cache.layers, start, prompt, strict=True):
        held = sorted(layer.store.positions[0, 0].tolist())
        slot = share - 4 if share > 4 else share // 2
        # What lies before the slot is never touched, and all behind it is the latest text.
        assert len(held) == share * 100 // 60 and held[:slot] == before[:slot]
        assert held[slot:] == list(range(100 - (len(held) - slot), 100))


def test_it_costs_one_pass_over_the_prompt_and_none_while_decoding(tiny):
    lm = wb.load((random_llama(), tiny.tokenizer))
    session = wb.Session(lm, wb.PrefixKV(budget=20))
    session.prefill(ids(40)[0].tolist())
    session.generate(3, stop_at_end=False)
    flops = session.trace.flops(by=["phase", "component"]).query("component == 'method'").set_index("phase")["flops"]
    assert flops["prefill"] == 3 * 2 * 4 * 40 * 40 * 8  # layers x 2 x query heads x queries x keys x head size
    assert flops.get("decode", 0) == 0
