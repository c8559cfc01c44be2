"""Trained blocks in sessions: step by step they are the model run whole, their cost is in the trace, and they compose."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.engine.calibration import Calibration, Document, Needle
from workbench.experiments.blocks import documents, reached, rows_of
from workbench.methods.routing.trained import TrainedBlock
from workbench.models.blocks import training
from workbench.models.blocks.attach import attached
from workbench.models.fingerprint import fingerprint
from workbench.testing import footprint, ids, random_llama, random_model

BLOCKS = [cls for cls in wb.METHODS.values() if issubclass(cls, TrainedBlock)]
CAUSAL = [wb.Engram(), wb.VersatileFFN(), wb.VersatileFFN(loops="dense"), wb.MixtureOfRecursions(choice="threshold")]
"""Every block in the ways whose prefill looks at no later token."""
PROMPT = ids(20)[0].tolist()


def labelled(method) -> str:
    return method.label if isinstance(method, TrainedBlock) else method.name


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(num_hidden_layers=4), tiny.tokenizer))


def known(lm: wb.LM, method: TrainedBlock, changed: bool = True) -> TrainedBlock:
    """The method with weights that nothing was trained to, or the ones training starts with."""
    block = method.untrained(lm)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in block.parameters() if changed else ():
            weight.add_(0.05 * torch.randn(weight.shape, generator=generator))
    about = Calibration(method.name, method.calibration_knobs(), fingerprint(lm), (), {}, block.state_dict())
    return method.with_calibration(about)


def stepped(session: wb.Session, tokens: list[int], prompt_tokens: int) -> torch.Tensor:
    """`[T, V]` logits after the prompt and after each token that follows."""
    found = [session.prefill(tokens[:prompt_tokens])[0]]
    return torch.stack(found + [session.step([token])[0] for token in tokens[prompt_tokens:]])


def whole(lm: wb.LM, method: TrainedBlock, tokens: list[int]) -> torch.Tensor:
    with torch.no_grad(), attached(method.forwards(lm, None)):
        return lm.model(torch.tensor([tokens])).logits[0]


@pytest.mark.parametrize("method", CAUSAL, ids=labelled)
def test_prefill_and_decode_are_the_model_run_whole(lm, method):
    method = known(lm, method)
    before = footprint(lm.model)
    session = wb.Session(lm, method)
    logits = stepped(session, PROMPT, 8)
    torch.testing.assert_close(logits, whole(lm, method, PROMPT)[7:], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(logits[-1], wb.Session(lm).prefill(PROMPT)[0], atol=1e-3)
    assert footprint(lm.model) == before


@pytest.mark.parametrize("method", CAUSAL, ids=labelled)
def test_an_appended_turn_and_a_branch_go_on_from_what_was_seen(lm, method):
    method = known(lm, method)
    session = wb.Session(lm, method)
    session.prefill(PROMPT[:6])
    fork = session.branch()
    fork.step([9])
    if isinstance(method, wb.MixtureOfRecursions):
        for token in PROMPT[6:12]:  # a turn's tokens are chosen as a prompt's are: here all the same, each for itself
            session.step([token])
    else:
        session.append(PROMPT[6:12])
    torch.testing.assert_close(session.logits[0], whole(lm, method, PROMPT[:12])[-1], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(fork.logits[0], whole(lm, method, [*PROMPT[:6], 9])[-1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cls", BLOCKS, ids=labelled)
def test_a_batch_is_each_row_alone(lm, cls):
    method, rows = known(lm, cls()), [PROMPT[:12], PROMPT[3:10]]
    batch, alone = wb.Session(lm, method), [wb.Session(lm, method) for _ in rows]
    batch.prefill(rows)
    for session, row in zip(alone, rows, strict=True):
        session.prefill(row)
    for tokens in ([5, 6], [9, 9], [2, 3], [40, 41]):
        torch.testing.assert_close(batch.logits, torch.cat([session.logits for session in alone]), atol=1e-5, rtol=1e-4)
        batch.step(tokens)
        for session, token in zip(alone, tokens, strict=True):
            session.step([token])


def test_an_untrained_engram_is_the_model_bit_for_bit(lm):
    session, dense = wb.Session(lm, known(lm, wb.Engram(), changed=False)), wb.Session(lm)
    assert torch.equal(stepped(session, PROMPT, 8), stepped(dense, PROMPT, 8))
    assert len(session.trace.table("work")) == 13 * 2


def test_engram_remembers_nothing_of_what_ran_before_a_swap(lm):
    """The tokens before are like padding, and a rehearsal's are taken back."""
    method = known(lm, wb.Engram())
    session = wb.Session(lm, wb.LookaheadKV(budget=1000, mode="pseudo"))
    session.prefill(PROMPT[:8])
    session.swap([wb.LookaheadKV(budget=1000, mode="pseudo"), method])
    fresh = wb.Session(lm, method)
    fresh.prefill(PROMPT[:8])
    assert not torch.allclose(session.step([5]), fresh.step([5]), atol=1e-4)
    rehearsed = wb.Session(lm, [wb.LookaheadKV(budget=1000, mode="pseudo"), method])
    rehearsed.prefill(PROMPT[:8])
    torch.testing.assert_close(rehearsed.step([5]), fresh.logits, atol=1e-5, rtol=1e-4)


def test_versatile_ffn_tells_slices_and_passes_and_what_they_took(lm):
    ragged, dense = (known(lm, wb.VersatileFFN(loops=loops)) for loops in ("ragged", "dense"))
    sessions = [wb.Session(lm, method) for method in (ragged, dense)]
    for session in sessions:
        session.prefill(PROMPT)
    torch.testing.assert_close(sessions[0].logits, sessions[1].logits, atol=1e-5, rtol=1e-4)
    routing = sessions[0].trace.table("routing")
    by_choice = routing.pivot(index="layer", columns="expert", values="tokens")
    weights = routing.groupby("layer")["weight_sum"].sum()
    assert by_choice.shape == (4, 12) and (by_choice[[8, 9, 10, 11]].sum(axis=1) == 20).all()
    easy = 20 - by_choice[11]
    assert (by_choice[range(8)].sum(axis=1) == 2 * easy).all() and weights.tolist() == pytest.approx([20] * 4)
    passes = sum(number * by_choice[7 + number] for number in (1, 2, 3, 4))
    one = 6 * 32 * 48
    flops = [session.trace.flops(by=["layer", "component"]).query("component == 'mlp'")["flops"] for session in sessions]
    assert flops[0].tolist() == (passes * one + easy * one // 4).tolist()
    most = by_choice[[8, 9, 10, 11]].gt(0).apply(lambda row: max(number for number in range(4) if row.iloc[number]) + 1, axis=1)
    assert flops[1].tolist() == (20 * most * one + easy * one // 4).tolist() and flops[1].sum() > flops[0].sum()


def test_a_recursion_caches_and_computes_the_tokens_it_keeps_alone(lm):
    session = wb.Session(lm, known(lm, wb.MixtureOfRecursions()))
    session.prefill(PROMPT)
    stores = [layer.store for layer in session._cache.layers]
    assert [store.length for store in stores] == [20, 20, 10, 20]
    kept = stores[2].positions[0, 0].tolist()
    assert kept == sorted(kept) and stores[3].positions[0, 0].tolist() == list(range(20))
    trace = session.trace
    assert trace.table("attention")["q_len"].tolist() == [20, 20, 10, 20]
    routing = trace.table("routing").query("tokens > 0")
    assert routing[["layer", "expert", "tokens"]].values.tolist() == [[1, 0, 20], [2, 1, 10]]
    mlp = trace.flops(by=["layer", "component"]).query("component == 'mlp'")["flops"].tolist()
    assert mlp == [6 * 32 * 48 * tokens for tokens in (20, 20, 10, 20)]
    routers = trace.flops(by=["component", "slot"]).query("slot == 'routing'")["flops"].sum()
    assert routers == 2 * 2 * 32 * 20


def test_the_threshold_decides_about_as_the_ranking_would(tiny):
    """Of the weights that come with tiny-dense: about half of the tokens decoded take the second recursion."""
    session = wb.Session(tiny, wb.MixtureOfRecursions())
    (episode,) = wb.workloads.recall(context=128, samples=1, facts=4).episodes(tiny)
    session.prefill(episode.context[:64])
    for token in episode.context[64:]:
        session.step([token])
    steps = len(episode.context) - 64
    assert 0.3 * steps < session._cache.layers[2].store.length - 32 < 0.7 * steps


def test_a_decoded_token_takes_a_recursion_if_its_router_says_so(lm):
    session = wb.Session(lm, known(lm, wb.MixtureOfRecursions()))
    session.prefill(PROMPT)
    for token in range(2, 32):
        session.step([token])
    ran = session.trace.table("attention").query("step > 0 and layer == 2")["step"].nunique()
    assert 0 < ran < 30 and session._cache.layers[2].store.length == 10 + ran
    told = session.trace.table("routing").query("step > 0 and layer == 2 and expert == 1")["tokens"].sum()
    assert told == ran and session._cache.layers[3].store.length == 50


@pytest.mark.parametrize("cls", BLOCKS, ids=labelled)
@pytest.mark.parametrize(
    "cache", [wb.H2O(budget=0.4), wb.FastKV(budget=0.4, window=4), wb.CAKE(budget=0.4, window=4)], ids=labelled
)
def test_a_cache_method_beside_a_block_keeps_its_budget(lm, cls, cache):
    session = wb.Session(lm, [cache, known(lm, cls())])
    session.prefill([PROMPT, PROMPT[:14]])
    session.generate(4)
    assert session.logits.isfinite().all()
    held = [layer.store.held_tokens() / 2 for layer in session._cache.layers]  # of both rows, by kv head
    assert sum(held) <= 4 * (8 + 6 + 8)  # of 20 and of 14 tokens, and those decoded
    slots = session.trace.flops(by="slot").set_index("slot")["flops"]
    assert slots["routing"] > 0 and slots["cache"] >= 0 and slots["model"] > 0


def test_tokens_a_recursion_leaves_out_are_not_the_cache_methods_evictions(tiny):
    """Of an appended turn half the tokens pass the second recursion by; SnapKV, which acts on prompts, has nothing to do."""
    setup = [wb.SnapKV(budget=0.2), known(tiny, wb.MixtureOfRecursions(), changed=False)]
    (_, row) = wb.compare(tiny, wb.workloads.recall(context=128, samples=1, facts=2), [setup]).rows
    assert row.fired_layers == row.layers == 4 and row.fired_steps == row.steps == 1
    assert row.rerouted[:2] == (2, 2)


def test_a_cache_method_may_thin_before_tokens_are_left_out_and_not_after(lm):
    block = known(lm, wb.MixtureOfRecursions())
    session = wb.Session(lm, [wb.FastKV(budget=0.5, window=4), block])
    session.prefill(PROMPT)
    session.generate(3)
    lengths = session.trace.table("attention").query("step == 0")["q_len"].tolist()
    assert lengths[:2] == [20, 20] and lengths[2:] == [5, 10]
    refused = wb.Session(lm, [wb.FastKV(budget=0.25, window=4, before=0.75), block])
    with pytest.raises(wb.UserError, match="after a layer that the routing method has left tokens out of"):
        refused.prefill(PROMPT)


def test_engram_goes_on_from_what_drafts_left(tiny):
    """Sirius takes back what the whole model would not have said; with a threshold above 1 its text is the greedy one."""
    block = known(tiny, wb.Engram())
    prompt = "The function returns"
    sessions = [wb.Session(tiny, [wb.Sirius(threshold=2.0, kernel_size=6), block]), wb.Session(tiny, block)]
    for session in sessions:
        session.prefill(prompt)
    drafted, greedy = (session.generate(12, stop_at_end=False) for session in sessions)
    assert drafted.ids == greedy.ids


@pytest.mark.parametrize("cls", [wb.VersatileFFN, wb.MixtureOfRecursions], ids=labelled)
def test_drafts_beside_a_block_they_cannot_go_with_are_one_sentence(tiny, cls):
    with pytest.raises(wb.UserError) as caught:
        wb.Session(tiny, [wb.Sirius(), cls()])
    assert "\n" not in str(caught.value) and cls.name in str(caught.value)


@pytest.mark.parametrize("cls", BLOCKS, ids=labelled)
def test_two_steps_of_training_are_a_calibration(lm, cls, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    method, told = cls(steps=2), []
    row = tuple(PROMPT)
    needle = Needle(4, 8, (19, 20, 21, 22))
    texts = [Document((*each, *each[4:8]), 20, (needle,)) for each in (row, row[::-1])]
    found = wb.calibrate(lm, method, documents=texts, on_progress=lambda *each: told.append(each))
    assert told == [(f"{cls.name}: steps", 1, 2), (f"{cls.name}: steps", 2, 2)]
    assert {tensor.dtype for tensor in found.tables.values()} <= {torch.float16, torch.int64}
    start = method.untrained(lm).state_dict()
    assert any(not torch.equal(tensor, start[name].to(tensor.dtype)) for name, tensor in found.tables.items())
    assert not any(parameter.grad is not None for parameter in lm.model.parameters())
    torch.manual_seed(5)
    again = wb.calibrate(lm, method, documents=texts)
    assert all(torch.equal(tensor, again.tables[name]) for name, tensor in found.tables.items())
    session = wb.Session(lm, method)
    session.prefill(PROMPT)
    assert session.logits.isfinite().all() and session.setup.routing.resident_bytes(lm) > 0


def test_texts_without_a_next_token_are_one_sentence(lm, tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    with pytest.raises(wb.UserError, match="no text has two"):
        wb.calibrate(lm, wb.Engram(steps=1), documents=[Document((5,), 1)])


def test_training_texts_are_prose_and_recall_whose_answers_count(tiny):
    texts = documents(rows_of(tiny, held_out=True), 2)  # which are fewer to make
    assert 2 * 2048 <= sum(len(text.tokens) for text in texts) < 2 * 2048 + 512
    prose, recall = texts[::2], texts[1::2]
    assert not any(text.needles for text in prose) and all(text.needles for text in recall)
    for text in recall:
        for needle in text.needles:
            asked = [text.tokens[place + 1] for place in needle.asking]
            assert len(asked) == 3 and asked == list(text.tokens[needle.start : needle.stop])
            assert needle.stop <= text.prompt_tokens <= needle.asking[0] + 1


@pytest.mark.parametrize("cls", BLOCKS, ids=labelled)
def test_what_was_reached_is_measured_in_every_way_that_answers_differently(tiny, cls, monkeypatch):
    monkeypatch.setattr(training, "LENGTHS", (128,))
    monkeypatch.setattr(training, "SAMPLES", 2)
    rows = rows_of(tiny, held_out=True)
    rows.stream = rows.stream[:1100]
    method = known(tiny, cls(), changed=False)
    found = reached(tiny, method, rows)
    ways = {"mixture-of-recursions": 2}.get(cls.name, 1)
    assert len(found["after"]) == ways and method.label in found["after"]
    assert found["before"]["recall_by_length"] == {128: 1.0} and 2 < found["before"]["held_out_nats"] < 5
    assert found["untrained"] == found["after"][method.label]
    same = [after == found["before"] for after in found["after"].values()]
    assert same == [cls is wb.Engram] * ways  # which alone changes nothing before it is trained


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("qwen3_moe", {"num_hidden_layers": 4}, "layer 0 of Qwen3MoeForCausalLM has experts"),
        ("gpt2", {"n_layer": 4}, "has 2 norms and 2 matrices in its FFN"),
        ("gemma2", {"num_hidden_layers": 4}, "has 4 norms and 3 matrices in its FFN"),
    ],
)
@pytest.mark.parametrize("cls", BLOCKS, ids=labelled)
def test_a_model_of_another_make_is_one_sentence(tiny, cls, family, changes, message):
    lm = wb.load((random_model(family, **changes), tiny.tokenizer))
    with pytest.raises(wb.UserError, match=message) as caught:
        wb.Session(lm, cls())
    assert "\n" not in str(caught.value) and cls.name in str(caught.value)


def test_too_few_layers_and_neurons_that_cannot_be_cut_are_one_sentence(tiny):
    lm = wb.load((random_llama(num_hidden_layers=3, intermediate_size=42), tiny.tokenizer))
    with pytest.raises(wb.UserError, match="four or more, and LlamaForCausalLM has 3"):
        wb.Session(lm, wb.MixtureOfRecursions())
    with pytest.raises(wb.UserError, match="8 equal slices, which the 42 neurons of layer 0"):
        wb.Session(lm, wb.VersatileFFN())
