"""Positions by cache slot: attention then depends on what is held and its order alone."""

from __future__ import annotations

import itertools

import pytest
import torch

import workbench as wb
from workbench.probes.rotation import Rotation
from workbench.testing import ids, random_llama, random_model

METHODS = [wb.StreamingLLM(budget=12, positions="slot"), wb.H2O(budget=12, positions="slot")]


@pytest.mark.parametrize(
    ("family", "method"),
    [*itertools.product(["llama", "qwen3", "phi3", "gemma2"], METHODS), ("gpt_neox", METHODS[0])],
    ids=lambda each: each if isinstance(each, str) else each.name,
)
def test_kept_tokens_as_a_fresh_prompt_give_the_same_logits(tiny, family, method):
    """A model of one layer, so that K and V of a token are its own; one kept set: of one kv head, or StreamingLLM's."""
    alone = {"num_key_value_heads": 4} if family == "gpt_neox" else {"num_key_value_heads": 1}
    layers = {"layer_types": ["full_attention"]} if family == "gemma2" else {}
    lm = wb.load((random_model(family, num_hidden_layers=1, **alone, **layers), tiny.tokenizer))
    prompt = ids(40)[0].tolist()
    by_slot, by_position = wb.Session(lm, method), wb.Session(lm, type(method)(budget=12))
    for session in (by_slot, by_position):
        session.prefill(prompt)
    for token in (9, 8, 7):
        held = sorted(by_slot._cache.layers[0].store.positions[0, 0].tolist())
        fresh = wb.Session(lm)
        expected = fresh.prefill([by_slot.tokens[0][position] for position in held] + [token])
        torch.testing.assert_close(by_slot.step([token]), expected, atol=2e-5, rtol=1e-4)
        assert not torch.allclose(by_position.step([token]), expected, atol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_an_appended_turn_goes_on_by_slot(tiny, method):
    lm = wb.load((random_llama(1, num_hidden_layers=1), tiny.tokenizer))
    session = wb.Session(lm, method)
    session.prefill(ids(40)[0].tolist())
    held = sorted(session._cache.layers[0].store.positions[0, 0].tolist())
    kept = [session.tokens[0][position] for position in held]
    turn = ids(5, seed=4)[0].tolist()
    torch.testing.assert_close(session.append(turn), wb.Session(lm).prefill(kept + turn), atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_until_something_is_missing_slots_are_positions(tiny, method):
    lm = wb.load((random_llama(), tiny.tokenizer))
    session, dense = wb.Session(lm, type(method)(budget=100, positions="slot")), wb.Session(lm)
    for each in (session, dense):
        each.prefill([ids(40)[0].tolist(), ids(31, seed=1)[0].tolist()])
    assert torch.equal(session.step([3, 4]), dense.step([3, 4]))
    assert session.trace.table("cache").query("op == 'place'").empty


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_a_short_row_of_a_batch_stands_where_it_stands_alone(tiny, method):
    lm = wb.load((random_llama(), tiny.tokenizer))
    long, short = ids(40)[0].tolist(), ids(29, seed=1)[0].tolist()
    together, alone = wb.Session(lm, method), wb.Session(lm, method)
    together.prefill([long, short])
    alone.prefill(short)
    for token in (3, 4, 5):
        both = together.step([token, token])
        torch.testing.assert_close(both[1], alone.step([token])[0], atol=1e-5, rtol=1e-5)


def test_the_trace_says_what_turning_costs(tiny):
    lm = wb.load((random_llama(), tiny.tokenizer))
    session = wb.Session(lm, METHODS[0])
    session.prefill(ids(40)[0].tolist())
    session.step()
    placed = session.trace.table("cache").query("op == 'place'")
    assert placed["layer"].tolist() == [0, 1, 2]
    assert (placed["extra_bytes"] == 2 * 2 * 13 * 8 * 4).all()  # 13 keys of 2 heads of 8 floats, read and written


@pytest.mark.parametrize("interleaved", [False, True])
def test_moving_undoes_what_moved_back(interleaved):
    torch.manual_seed(0)
    rotation, states = Rotation(torch.tensor([1.0, 0.3]), interleaved), torch.randn(2, 3, 7, 6)
    by = torch.randint(-50, 50, (2, 3, 7))
    torch.testing.assert_close(rotation.moved(rotation.moved(states, by), -by), states)
    positions = by[:, :1].expand(2, 3, 7)
    torch.testing.assert_close(rotation.undone(rotation.moved(states, positions), by[:, 0]), states)


def test_positions_are_words(tiny):
    assert wb.METHODS["h2o"]().positions == "true"
    setup = wb.compare(tiny, wb.workloads.recall(context=96, samples=1, facts=1), ["streaming-llm:positions=slot,budget=0.5"])
    assert setup.rows[1].setup == "streaming-llm(budget=0.5, positions=slot)" and setup.rows[1].fired_layers == 4
    with pytest.raises(wb.UserError, match="cannot be 'sometimes'; choose 'true' or 'slot'"):
        wb.StreamingLLM(positions="sometimes")
