"""Methods that know a model beforehand: the sheets' worked examples, what their tables say, and what they keep."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

import workbench as wb
from workbench.cost.metrics import fired
from workbench.engine.calibration import Calibration, Document, Needle, Sample
from workbench.engine.policy import LayerState
from workbench.experiments.calibrate import observed
from workbench.methods.cache.base import observe_window, pool_scores
from workbench.methods.cache.budgets import by_error, by_gates, two_groups
from workbench.methods.cache.compress_kv import _output_error
from workbench.methods.cache.duo_attention import _reach
from workbench.methods.cache.uncomp import matrix_entropy
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
    gates = wb.DuoAttention(gates="calibrated").calibrate(samples)["gates"]
    assert gates.shape == (3, 2)
    expected = (_reach(samples[0].layers[2]) + _reach(samples[1].layers[2]))[0] / 2
    torch.testing.assert_close(gates[2], expected)


def duo_session(tiny, num_kv_heads=2, gates=((0.1, 0.9), (0.8, 0.2), (0.3, 0.4)), **knobs) -> wb.Session:
    """After a prompt of 60 tokens, with these gates, or 4 heads drawn at random."""
    lm = wb.load((random_llama(num_kv_heads), tiny.tokenizer))
    method = wb.DuoAttention(gates="calibrated", **knobs)
    about = Calibration(method.name, method.calibration_knobs(), fingerprint(lm), (0, 1, 2), {}, {"gates": torch.tensor(gates)})
    session = wb.Session(lm, method.with_calibration(about))
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


@pytest.mark.parametrize("num_heads", [1, 2, 4])
def test_as_many_heads_stream_as_the_share_of_streaming_heads_says(num_heads):
    """A budget that is `whole heads * longest + streaming heads * streamed` leaves round(L H ratio) heads streaming."""
    longest, streamed, num_layers = 100, 20, 3
    total = num_layers * num_heads
    gates = torch.rand(num_layers, num_heads, generator=torch.Generator().manual_seed(num_heads))
    for ratio in (0, 0.25, 1 / 3, 0.5, 0.75, 1):
        num_streaming = round(total * ratio)
        mean = -(-((total - num_streaming) * longest + num_streaming * streamed) // total)
        method = told(wb.DuoAttention(budget=mean, sinks=5, recent=15), gates=gates.tolist())
        shares = method.allocate(longest, num_layers)
        whole_heads = [method._num_whole(num_heads, share, longest) if mean < longest else num_heads for share in shares]
        assert sum(whole_heads) == total - num_streaming and sum(shares) == num_layers * mean
        best = gates.flatten().argsort(descending=True)[: sum(whole_heads)] // num_heads
        assert whole_heads == best.bincount(minlength=num_layers).tolist()


def test_trained_gates_recall_where_a_stand_in_forgets(tiny):
    """At a third of the memory, in a comparison."""
    workload = wb.workloads.recall(context=256, samples=1, facts=4)
    ways = ("trained", "calibrated", "prompt")
    methods = [f"duo-attention:budget=0.4,sinks=4,recent=30,gates={gates}" for gates in ways]
    trained, calibrated, prompt = wb.compare(tiny, workload, methods).rows[1:]
    assert trained.fired_steps == trained.steps == calibrated.fired_steps == calibrated.steps > 8
    assert trained.score == 1 > max(calibrated.score, prompt.score)


def test_a_batch_of_calibrated_duo_attention_is_each_row_alone(tiny):
    alone = duo_session(tiny, budget=0.5, sinks=3, recent=5)
    together = wb.Session(alone.lm, alone.setup)
    together.prefill([ids(60)[0].tolist(), ids(45, seed=4)[0].tolist()])
    for _ in range(6):
        token = alone.logits.argmax(-1).item()
        torch.testing.assert_close(alone.step([token])[0], together.step([token, 7])[0], atol=1e-5, rtol=1e-5)


def test_matrix_entropy_worked_example():
    """Of states on one line 0, of states that point anywhere 1, and half of that over half of the eigenvalues."""
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(200, 1, generator=generator) * torch.randn(1, 8, generator=generator)
    anywhere = torch.randn(4096, 8, generator=generator)
    assert matrix_entropy(line, 1.0).item() == pytest.approx(0, abs=1e-6)
    assert matrix_entropy(anywhere, 1.0).item() == pytest.approx(0.9997, abs=3e-4)
    assert matrix_entropy(anywhere, 0.5).item() == pytest.approx(0.51, abs=0.01)
    both = matrix_entropy(torch.stack([line, anywhere[:200]]), 0.5)
    assert both.shape == (2,) and both[1] == matrix_entropy(anywhere[:200], 0.5)


def test_uncomp_groups_keep_two_to_one():
    assert two_groups([True, False, False, True], 384, 1000, 2.0) == [512, 256, 256, 512]
    assert two_groups([True, False], 9, 10, 2.0) == [10, 8]  # no head has more than the prompt
    assert two_groups([True, False], 1, 10, 60.0) == [1, 1]  # and none is empty
    assert two_groups([True], 7, 10, 2.0) == [7]
    for mean, ratio, high in itertools.product((1, 5, 30, 49), (1.0, 2.0, 7.5), ([1, 0], [1, 1, 0], [0, 1, 0, 1, 1, 0, 0, 1])):
        budgets = two_groups([bool(each) for each in high], mean, 50, ratio)
        assert sum(budgets) == mean * len(high) and min(budgets) >= 1 and max(budgets) <= 50


def test_uncomp_groups_are_halves_by_majority():
    """Queries of kv head 0 lie on one line in two texts of three and those of head 1 in the third; heads 2 and 3 never do."""
    samples = []
    for flat in (0, 0, 1):
        state = layer_state(50, num_q_heads=8, num_kv_heads=4, seed=flat)
        state.queries[:, 2 * flat : 2 * flat + 2] = torch.arange(50.0)[:, None] * torch.ones(8)
        samples.append(Sample(Document(tuple(range(50)), 50), (state,), ()))
    tables = wb.UNComp(rank=1.0).calibrate(samples)
    assert tables["high"].sum() == 2 and not tables["high"][0, 0] and tables["entropy"].shape == (1, 4)
    assert tables["entropy"][0, 0] < tables["entropy"][0, 1] < 0.75 < tables["entropy"][0, 2]


def uncomp_session(tiny, num_kv_heads, high, **knobs) -> wb.Session:
    lm = wb.load((random_llama(num_kv_heads), tiny.tokenizer))
    method = wb.UNComp(**knobs)
    tables = {"high": torch.tensor([high] * 3)}
    known = Calibration(method.name, method.calibration_knobs(), fingerprint(lm), (0, 1, 2), {}, tables)
    return wb.Session(lm, method.with_calibration(known))


def test_uncomp_holds_its_two_budgets_from_the_prompt_on(tiny):
    session = uncomp_session(tiny, 4, [True, False, False, True], budget=18, window=4)
    session.prefill(ids(60))
    for _ in range(8):
        assert held_by_head(session) == [[24, 12, 12, 24]] * 3
        session.step()


@pytest.mark.parametrize("budget", [9, 30])
def test_uncomp_of_equal_budgets_is_snapkv_at_the_end_of_the_prompt(tiny, budget):
    """With a query head for each kv head, since a group is averaged before it is pooled."""
    session = uncomp_session(tiny, 4, [True, False, False, True], budget=budget, window=4, ratio=1.0)
    snapkv = wb.Session(session.lm, wb.SnapKV(budget=budget, window=4, kernel=7, pooling="max"))
    for each in (session, snapkv):
        each.prefill(ids(60))
    for ours, theirs in zip(session._cache.layers, snapkv._cache.layers, strict=True):
        assert torch.equal(ours.store.positions.sort(-1).values, theirs.store.positions.sort(-1).values)


def test_uncomp_keeps_what_a_plain_loop_over_the_last_rows_keeps(tiny):
    """Layer 0, whose queries and keys no eviction changes, over a prompt and ten steps; two query heads a kv head."""
    window, kernel, steps = 4, 5, 10
    session = uncomp_session(tiny, 2, [False, True], budget=12, window=window, kernel=kernel)
    recording = wb.record(session.lm, ids(40), new_tokens=steps)
    layer, tokens = recording.layers[0], recording.trace.table("tokens")["id"].tolist()
    session.prefill(ids(40))
    held = [list(range(40)), list(range(40))]
    rows = [[], []]
    for now in range(39, 39 + steps):
        if now > 39:
            session.step([tokens[now]])
        for head, count in enumerate((8, 16)):
            if now > 39:
                held[head].append(now)
            for position in range(40 - window, 40) if now == 39 else [now]:
                seen = [j for j in held[head] if j <= position]
                weights = torch.stack(
                    [
                        (layer.keys[head, seen] @ layer.queries[2 * head + g, position] * layer.scaling).softmax(0)
                        for g in range(2)
                    ]
                ).mean(0)
                rows[head].append(dict(zip(seen, weights.tolist(), strict=True)))
            votes = [sum(row.get(j, 0.0) for row in rows[head][-window:]) for j in held[head]]
            votes = votes[:-window] + [0.0] * window
            reach = kernel // 2
            pooled = [max(votes[max(i - reach, 0) : i + reach + 1]) for i in range(len(votes) - window)]
            best = sorted(range(len(pooled)), key=lambda i: (-pooled[i], i))[: count - window]
            held[head] = [held[head][i] for i in sorted(best)] + held[head][-window:]
        store = session._cache.layers[0].store
        assert [sorted(set(head.tolist()) - {-1}) for head in store.positions[0]] == held


def test_what_lies_in_empty_slots_lends_nothing_to_the_first_tokens():
    """The shorter head's empty slots come first, and pooling must not take them for neighbours."""
    method = told(wb.UNComp(budget=8, window=2, kernel=3), high=[[False, True]])
    rows = torch.rand(1, 2, 12, 2, generator=torch.Generator().manual_seed(1))
    rows[0, 0, 4:6] = 0
    positions = torch.arange(12, dtype=torch.int32).repeat(1, 2, 1)
    positions[0, 0, :4] = -1
    state = dataclasses.replace(layer_state(8, length=12), positions=positions, side={"rows": rows})
    masks = []
    for left_over in (0.0, 100.0):
        rows[0, 0, :4] = left_over
        masks.append(method.keep(state))
    assert torch.equal(*masks) and masks[0].sum(-1).tolist() == [[5, 11]]


def test_uncomp_side_state_is_counted(tiny):
    session = uncomp_session(tiny, 2, [False, True], budget=12, window=4)
    session.prefill(ids(40))
    score = session.trace.table("cache").query("op == 'score' and layer == 0")
    # 4 query heads x 4 queries x 40 keys x head size 8; the four rows of both kv heads are read when it decides
    assert score["extra_flops"].tolist() == [2 * 4 * 4 * 40 * 8, 0] and score["extra_bytes"].tolist()[1] == 4 * 2 * 40 * 4
