"""PrefixKV: the sheet's worked examples, the solver's properties, and the fixed slot of decoding."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

import workbench as wb
from workbench.engine.calibration import Calibration, Document, Sample
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


def state(mass, share, capacity=None, positions=None, first=True) -> LayerState:
    """One row, two kv heads."""
    mass = torch.tensor(mass, dtype=torch.float32).expand(1, 2, -1)
    keys = torch.zeros(1, 2, mass.shape[2], 2)
    positions = torch.arange(mass.shape[2]) if positions is None else torch.tensor(positions)
    share, capacity = torch.tensor([share]), torch.tensor([share if capacity is None else capacity])
    positions = positions.expand(1, 2, -1)
    return LayerState(keys, keys, positions, capacity, 1.0, 0, 1, "decode", None, mass, share=share, first=first)


def test_heads_share_one_set_with_the_sinks_and_the_newest():
    seen = state([0.1, 0.2, 9.0, 0.3, 8.0, 0.4, 7.0, 0.05], share=5)
    mass = seen.mass.clone()
    mass[0, 1] = torch.tensor([0, 0, 0, 20.0, 0, 0, 0, 0])  # the other head's favourite counts as much
    mask = wb.PrefixKV(sinks=2).keep(dataclasses.replace(seen, mass=mass))
    assert mask[0, 0].nonzero().flatten().tolist() == [0, 1, 2, 3, 7] and torch.equal(mask[0, 0], mask[0, 1])


def test_while_decoding_the_token_at_a_fixed_slot_goes():
    # A share of 6 and a tail of 2: slot 4 in the order of the text, whatever the order in memory.
    seen = state([0.0] * 7, share=6, capacity=6, positions=[0, 9, 2, 3, 4, 5, 8], first=False)
    mask = wb.PrefixKV(tail=2).keep(seen)
    assert seen.positions[0, 0][~mask[0, 0]].tolist() == [5]
    # With an appended turn several tokens pass it at once; a tail longer than the share leaves its middle.
    seen = state([0.0] * 9, share=6, capacity=6, first=False)
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


def sample(*layers: np.ndarray) -> Sample:
    """A text whose layers gave its tokens so much attention, in two kv heads."""
    states = []
    for layer, importance in enumerate(layers):
        mass = torch.tensor(importance / 2, dtype=torch.float64).expand(1, 2, -1)
        keys, positions = torch.zeros(1, 2, len(importance), 2), torch.arange(len(importance)).expand(1, 2, -1)
        states.append(
            LayerState(keys, keys, positions, torch.tensor([1]), 1.0, layer, len(layers), "prefill", None, mass, first=True)
        )
    return Sample(Document(tuple(range(len(layers[0]))), len(layers[0])), tuple(states), ())


def calibrated(*samples: Sample, **knobs) -> wb.PrefixKV:
    method = wb.PrefixKV(**{"ratios": "calibrated", **knobs})
    num_layers = len(samples[0].layers)
    tables = method.calibrate(samples)
    about = Calibration(method.name, method.calibration_knobs(), "none", tuple(range(num_layers)), {}, tables)
    return method.with_calibration(about)


def test_calibrated_ratios_of_one_text_are_those_solved_for_it():
    """At each budget of the grid, and for a text of another length in the same proportions."""
    text = sample(np.repeat(STEEP, 5) / 5, np.repeat(FLAT, 5) / 5)
    for twentieths in range(1, 20):
        method, budget = calibrated(text, sinks=0), 2 * twentieths
        solved = shares(budget, np.repeat(STEEP, 5), np.repeat(FLAT, 5))
        assert method.with_budget(budget).allocate(40, 2) == method.with_budget(twentieths / 20).allocate(40, 2) == solved
        assert method.with_budget(2 * budget).allocate(80, 2) == [2 * each for each in solved]
    # between two budgets of the grid, a straight line
    (low, _), (high, _) = (method.with_budget(budget).allocate(400, 2) for budget in (200, 220))
    assert method.with_budget(210).allocate(400, 2) == [(low + high) // 2, 420 - (low + high) // 2]


def test_calibrated_ratios_are_the_mean_over_texts():
    steep_first, flat_first = (sample(*layers) for layers in ((STEEP, FLAT), (FLAT, STEEP)))
    method = wb.PrefixKV(sinks=0, ratios="calibrated")
    drops = [method.calibrate(texts)["drops"] for texts in ([steep_first], [flat_first], [steep_first, flat_first])]
    torch.testing.assert_close(drops[2], (drops[0] + drops[1]) / 2)
    assert drops[0].shape == (2, 19) and (drops[0][0] >= drops[0][1]).all()
    assert calibrated(steep_first, flat_first, sinks=0, budget=3).allocate(8, 2) == [3, 3]


def test_calibrated_shares_of_equal_layers_are_uniform():
    for budget in range(1, 9):
        assert calibrated(sample(FLAT, FLAT, FLAT), sinks=2, budget=budget).allocate(8, 3) == [budget] * 3


@pytest.mark.parametrize("length", [1, 9, 97, 600])
def test_a_flatter_layer_keeps_no_fewer_tokens_by_calibration_and_the_sum_is_met(length):
    layers = [np.arange(1, 98) ** -power for power in (0.1, 0.4, 1.1, 2.9)]
    method = calibrated(sample(*layers))
    for budget in {1, 2, 5, 8, length // 7, length // 3, length - 1, length} - {0}:
        kept = method.with_budget(budget).allocate(length, 4)
        assert sum(kept) == 4 * budget and min(kept) >= min(budget, 5)
        if budget <= length:
            assert max(kept) <= length and all(left >= right - 1 for left, right in itertools.pairwise(kept))


def test_calibrated_layers_decide_at_once_and_keep_their_ratio(tiny):
    method = wb.PrefixKV(budget=0.4, tail=4, ratios="calibrated")
    session = wb.Session(tiny, method)
    shares = session.setup.cache.allocate(60, 4)
    assert sum(shares) == 4 * 24 and len(set(shares)) > 1 and method.joint is None
    held = []
    hook = tiny.model.model.layers[1].register_forward_pre_hook(lambda *_: held.append(session._cache.layers[0].store.length))
    try:
        session.prefill(ids(60)[0].tolist())
    finally:
        hook.remove()
    assert held == [shares[0]]  # layer 0 has decided before layer 1 runs
    by_prompt = wb.Session(tiny, wb.PrefixKV(budget=0.4))
    by_prompt.prefill(ids(60)[0].tolist())
    for ours, theirs, share in zip(session._cache.layers, by_prompt._cache.layers, shares, strict=True):
        kept, others = (set(layer.store.positions[0, 0].tolist()) for layer in (ours, theirs))
        assert len(kept) == share and kept >= {0, 1, 2, 3, 59} and (kept <= others or others <= kept)
    prompt = [sorted(layer.store.positions[0, 0].tolist()) for layer in session._cache.layers]
    session.generate(40, stop_at_end=False)
    for layer, share, before in zip(session._cache.layers, shares, prompt, strict=True):
        now, slot = sorted(layer.store.positions[0, 0].tolist()), share - 4 if share > 4 else share // 2
        assert len(now) == share * 100 // 60 and now[:slot] == before[:slot]
        assert now[slot:] == list(range(100 - (len(now) - slot), 100))


def test_calibrated_shares_hold_after_a_swap_and_what_leaves_is_the_least_attended(tiny):
    session = wb.Session(tiny, wb.PrefixKV(budget=1.0))
    session.prefill(ids(60)[0].tolist())
    mass = [layer.store.side["mass"].clone() for layer in session._cache.layers]
    session.swap(wb.PrefixKV(budget=0.4, sinks=4, ratios="calibrated"))
    session.step([7])
    for layer, share, before in zip(session._cache.layers, session.setup.cache.allocate(60, 4), mass, strict=True):
        after = dict(zip(layer.store.positions[0, 0].tolist(), layer.store.side["mass"][0].sum(0).tolist(), strict=True))
        assert len(after) == share * 61 // 60 and after.keys() >= {0, 1, 2, 3, 60}
        gone = [mass for position, mass in enumerate(before[0].sum(0).tolist()) if position not in after]
        chosen = [mass for position, mass in after.items() if position not in {0, 1, 2, 3, 60}]
        assert not gone or min(chosen, default=9e9) >= max(gone)  # the step has only added to what was received before


def test_calibrated_ratios_are_replayed_as_they_run(tiny):
    recording = wb.record(tiny, ids(60), new_tokens=6)
    method = wb.PrefixKV(ratios="calibrated", tail=4)
    (point,) = wb.replay(recording, [method], [0.4]).points
    session = wb.Session(tiny, method.with_budget(0.4))
    session.prefill(ids(60))
    for token in recording.trace.table("tokens")["id"].tolist()[60:-1]:  # what the last token evicts, no later one misses
        session.step([token])
    for layer, gone in zip(session._cache.layers, point.gone, strict=True):
        for head in range(2):
            held = (gone[head] >= recording.steps).nonzero()[0].tolist()
            assert held == [*sorted(layer.store.positions[0, head].tolist()), 65]


def test_without_its_calibration_it_is_refused_in_one_sentence(tiny):
    lm = wb.load((random_llama(intermediate_size=56), tiny.tokenizer))
    with pytest.raises(wb.UserError, match=r"workbench calibrate --model .* --method prefixkv:ratios=calibrated,sinks=4` once"):
        wb.Session(lm, wb.PrefixKV(ratios="calibrated"))
    wb.Session(lm, wb.PrefixKV())
