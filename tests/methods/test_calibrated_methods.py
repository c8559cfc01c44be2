"""Methods that know a model beforehand: the sheets' worked examples, what their tables say, and what they keep."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import workbench as wb
from workbench.cost.metrics import fired
from workbench.engine.calibration import Calibration, Document, Needle
from workbench.engine.policy import LayerState
from workbench.experiments.calibrate import observed
from workbench.methods.cache.base import observe_window, pool_scores
from workbench.methods.cache.budgets import by_error, by_gates
from workbench.methods.cache.compress_kv import _output_error
from workbench.methods.cache.duo_attention import _reach
from workbench.models.fingerprint import fingerprint
from workbench.testing import calibrate_all, ids, random_llama


def layer_state(capacity, num_q_heads=4, num_kv_heads=2, length=50, seed=0) -> LayerState:
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(1, num_q_heads, length, 8, generator=generator)
    keys, values = torch.randn(2, 1, num_kv_heads, length, 8, generator=generator).unbind(0)
    positions = torch.arange(length, dtype=torch.int32).expand(1, num_kv_heads, length)
    return LayerState(keys, values, positions, torch.tensor([capacity]), 8**-0.5, 0, 1, "prefill", queries)


def told(method, **tables):
    """The method with these tables, one row a layer."""
    num_layers = len(next(iter(tables.values())))
    tables = {name: torch.tensor(table) for name, table in tables.items()}
    about = Calibration(method.name, method.calibration_knobs(), "none", tuple(range(num_layers)), {}, tables)
    return method.with_calibration(about)


def test_compress_kv_worked_example():
    errors = [0.5, 0.3, 0.15, 0.05]
    assert by_error(errors, 64, 32, 192) == [97, 70, 51, 38]
    assert by_error([0.9, 0.05, 0.03, 0.02], 64, 32, 96) == [96, 55, 53, 52]
    method = told(wb.CompressKV(budget=64), retrieval=[[1.0]] * 4, errors=errors)
    assert method.allocate(500, 4) == [97, 70, 51, 38]
    assert method.allocate(64, 4) == [64] * 4


def test_compress_kv_budgets_sum_and_stay_within_their_bounds():
    for mean, least, most in itertools.product((32, 33, 64, 200), (1, 16, 32), (2, 3)):
        for errors in ([1.0, 0, 0, 0], [0.25] * 4, [0.4, 0.35, 0.25], [0.7, 0.3]):
            budgets = by_error(errors, mean, least, most * mean)
            assert sum(budgets) == mean * len(errors) and all(least <= each <= most * mean for each in budgets)
            assert budgets == sorted(budgets, reverse=True) or len(set(errors)) == 1


def test_compress_kv_of_all_heads_is_snapkv_with_a_mean_over_heads():
    state = layer_state(20)
    mask = told(wb.CompressKV(budget=20, heads=4), retrieval=[[0.0, 0, 0, 0]], errors=[1.0]).keep(state)
    scores = pool_scores(observe_window(state, 8).sum(2)[..., :42], "avg", 5).mean(1)[0]
    before = scores.argsort(descending=True)[:12].tolist()
    for head in range(2):
        assert mask[0, head].nonzero().flatten().tolist() == sorted([*before, *range(42, 50)])


def test_compress_kv_listens_to_the_best_heads_alone():
    """Other heads' queries may be anything; which of a group's heads are best makes no difference to the kv heads' set."""
    method = told(wb.CompressKV(budget=20, heads=2), retrieval=[[0.1, 0.9, 0.0, 0.8]], errors=[1.0])
    state = layer_state(20)
    others = state.queries.clone()
    others[:, [0, 2]] = torch.randn(1, 2, 50, 8)
    mask = method.keep(state)
    assert torch.equal(mask, method.keep(dataclasses.replace(state, queries=others)))
    assert torch.equal(mask[:, 0], mask[:, 1]) and mask[0, 0].sum() == 20
    others[:, 1] = others[:, 0]
    assert not torch.equal(mask, method.keep(dataclasses.replace(state, queries=others)))


def test_compress_kv_finds_the_head_that_looks_at_the_needle(tiny):
    """Plain sums over the attention rows of the tokens about to be repeated; a repeated token counts as often as it stands."""
    lm = wb.load((random_llama(), tiny.tokenizer))
    prompt = ids(30)[0].tolist()
    prompt[6] = prompt[5]  # the needle holds one token twice
    document = Document((*prompt, *prompt[4:8]), 30, (Needle(4, 8, (29, 30, 31, 32)),))
    sample = observed(lm, document)
    tables = wb.CompressKV(heads=2, least=10).calibrate([sample])
    for layer, head in itertools.product(range(3), range(4)):
        state = sample.layers[layer]
        expected = 0.0
        for position, times in zip((29, 30, 31, 32), (1, 2, 2, 1), strict=True):
            row = (state.keys[0, head // 2, : position + 1] @ state.queries[0, head, position] * state.scaling).softmax(0)
            expected += times * row[4:8].sum().item()
        assert tables["retrieval"][layer, head].item() == pytest.approx(expected, rel=1e-4)
    assert tables["errors"].sum().item() == pytest.approx(1.0) and (tables["errors"] > 0).all()


def test_compress_kv_error_is_that_of_a_compressed_session(tiny):
    """What layer 0 gives after its output projection, for the first token after the prompt: dense, and with the prompt cut."""
    lm = calibrate_all(wb.load((random_llama(), tiny.tokenizer)))
    prompt, outputs = ids(40)[0].tolist(), []
    sessions = [wb.Session(lm), wb.Session(lm, wb.CompressKV(budget=12))]
    hook = lm.model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda *call: outputs.append(call[2][0, -1]))
    try:
        for session in sessions:
            session.prefill(prompt)
            kept = session._cache.layers[0].store.positions
            kept = torch.zeros(1, 2, 40, dtype=torch.bool).scatter(2, kept.long(), True)
            session.step([prompt[5]])
    finally:
        hook.remove()
    _, dense, _, compressed = outputs
    sample = observed(lm, Document((*prompt, prompt[5]), 40))
    found = _output_error(sample.layers[0], kept, sample.projections[0])
    assert found.item() == pytest.approx(((compressed - dense).norm() / dense.norm()).item(), rel=1e-3) and found > 0.01


def test_gates_are_ranked_over_all_layers():
    # 2 layers of 2 heads, 100 tokens, 10 a streaming head, mean 40: 4 x 40 - 4 x 10 = 120 is one whole head, and 30 are left
    # of it: 15 a head
    assert by_gates([[0.1, 0.9], [0.2, 0.3]], 40, 100, 10) == [55 + 8, 10 + 7]
    assert by_gates([[0.1, 0.9], [0.2, 0.3]], 56, 100, 10) == [56, 56]  # two whole heads, the second in the other layer
    assert by_gates([[0.8, 0.9], [0.2, 0.3]], 55, 100, 10) == [100, 10]
    assert by_gates([[0.8, 0.9], [0.2, 0.3]], 9, 100, 10) == by_gates([[0.8, 0.9], [0.2, 0.3]], 9, 10, 10) == [9, 9]


@pytest.mark.parametrize("num_heads", [1, 2, 3, 8])
def test_gates_share_out_exactly_the_budget(num_heads):
    generator = torch.Generator().manual_seed(num_heads)
    for mean, longest, streamed in itertools.product((1, 10, 37, 90, 99), (11, 100), (1, 4, 20)):
        if mean < longest:
            gates = torch.rand(5, num_heads, generator=generator).tolist()
            budgets = by_gates(gates, mean, longest, streamed)
            assert sum(budgets) == 5 * mean and all(min(mean, streamed) <= each <= longest for each in budgets)


def test_calibrated_gates_are_the_mean_reach(tiny):
    lm = wb.load((random_llama(), tiny.tokenizer))
    samples = [observed(lm, Document(tuple(ids(30, seed=seed)[0].tolist()), 30), with_rotation=True) for seed in (1, 2)]
    gates = wb.DuoAttention().calibrate(samples)["gates"]
    assert gates.shape == (3, 2)
    expected = (_reach(samples[0].layers[2]) + _reach(samples[1].layers[2]))[0] / 2
    torch.testing.assert_close(gates[2], expected)


def duo_session(tiny, num_kv_heads=2, gates=((0.1, 0.9), (0.8, 0.2), (0.3, 0.4)), **knobs) -> wb.Session:
    """After a prompt of 60 tokens, with these gates, or 4 heads drawn at random."""
    lm = wb.load((random_llama(num_kv_heads), tiny.tokenizer))
    method = wb.DuoAttention(gates="calibrated", **knobs)
    tables = {"gates": torch.tensor(gates)}
    session = wb.Session(lm, method.with_calibration(Calibration(method.name, {}, fingerprint(lm), (0, 1, 2), {}, tables)))
    session.prefill(ids(60)[0].tolist())
    return session


def held_by_head(session) -> list[list[int]]:
    return [(layer.store.positions[0] >= 0).sum(-1).tolist() for layer in session._cache.layers]


def test_streaming_heads_stay_as_short_while_whole_heads_grow(tiny):
    # 6 heads of mean 28, 8 a streaming head: 168 - 48 = 120 are two whole heads (52 more each), and 16 are left
    session = duo_session(tiny, budget=28, sinks=3, recent=5)
    at_prompt = held_by_head(session)
    whole_heads = [(layer, head) for layer in range(3) for head in range(2) if at_prompt[layer][head] == 60]
    assert whole_heads == [(0, 1), (1, 0)] and sum(map(sum, at_prompt)) == 168
    for step in range(1, 21):
        session.step()
        for layer, heads in enumerate(held_by_head(session)):
            for head, held in enumerate(heads):
                if (layer, head) in whole_heads:
                    assert held == 60 + step
                else:
                    assert at_prompt[layer][head] <= held <= at_prompt[layer][head] + 1
                    kept = sorted(set(session._cache.layers[layer].store.positions[0, head].tolist()) - {-1})
                    assert kept == [0, 1, 2, *range(63 + step - held, 60 + step)]
    done = fired(session.trace, [0, 1, 2])
    assert (done.layers, done.steps) == (3, 21) and done.steps == done.due_steps


def test_gates_of_all_heads_are_dense_and_of_none_streaming_llm(tiny):
    whole = duo_session(tiny, budget=60)
    dense = wb.Session(whole.lm)
    dense.prefill(ids(60)[0].tolist())
    none = duo_session(tiny, budget=9, sinks=4, recent=5)
    streaming = wb.Session(whole.lm, wb.StreamingLLM(budget=9, sinks=4))
    streaming.prefill(ids(60)[0].tolist())
    for _ in range(8):
        assert torch.equal(whole.step(), dense.step())
        torch.testing.assert_close(none.step(), streaming.step())
    assert held_by_head(none) == [[9, 9]] * 3


def test_calibrated_duo_attention_runs_in_a_comparison(tiny):
    workload = wb.workloads.recall(context=200, samples=1, facts=2)
    row = wb.compare(tiny, workload, ["duo-attention:budget=0.5,sinks=4,recent=30,gates=calibrated"]).rows[1]
    assert row.fired_steps == row.steps > 8


def test_a_batch_of_calibrated_duo_attention_is_each_row_alone(tiny):
    alone = duo_session(tiny, budget=0.5, sinks=3, recent=5)
    together = wb.Session(alone.lm, alone.setup)
    together.prefill([ids(60)[0].tolist(), ids(45, seed=4)[0].tolist()])
    for _ in range(6):
        token = alone.logits.argmax(-1).item()
        torch.testing.assert_close(alone.step([token])[0], together.step([token, 7])[0], atol=1e-5, rtol=1e-5)
