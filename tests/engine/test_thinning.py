"""Thinning: later layers really see fewer tokens, which keep their positions, and the trace says so."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import workbench as wb
from workbench.engine.policy import LayerState
from workbench.models.anatomy import decoder_layers
from workbench.probes.counting import FlopCount
from workbench.testing import footprint, ids, random_gemma, random_llama, random_model

PROMPT = 40


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(num_hidden_layers=4), tiny.tokenizer))


def prefilled(lm, method, prompt=None) -> wb.Session:
    session = wb.Session(lm, method)
    session.prefill(ids(PROMPT) if prompt is None else prompt)
    return session


def positions(session, layer, head=0) -> list[int]:
    return session._cache.layers[layer].store.positions[0, head].tolist()


def test_a_rate_of_one_leaves_the_prefill_and_a_whole_budget_leaves_everything(lm):
    dense = prefilled(lm, None)
    assert torch.equal(prefilled(lm, wb.FastKV(budget=0.3, rate=1.0)).logits, dense.logits)
    assert not torch.equal(prefilled(lm, wb.FastKV(budget=0.3, rate=0.5)).logits, dense.logits)
    whole = prefilled(lm, wb.FastKV(budget=1.0))
    assert torch.equal(whole.logits, dense.logits)
    for _ in range(3):
        assert torch.equal(whole.step(), dense.step())


def test_later_layers_see_the_tokens_that_go_on_at_their_positions(lm):
    """Hidden states of 40 tokens up to layer 1, of int(0.5 * 40) after it, the last 8 of the prompt among them."""
    seen = []
    blocks = decoder_layers(lm.model)
    hooks = [
        block.self_attn.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append((kwargs["hidden_states"], kwargs["position_embeddings"][0])), with_kwargs=True
        )
        for block in blocks
    ]
    try:
        session = prefilled(lm, wb.FastKV(budget=0.5, rate=0.5))
    finally:
        for hook in hooks:
            hook.remove()
    whole = seen[-4:]  # the trial on a short prompt came before
    assert [hidden.shape[1] for hidden, _ in whole] == [40, 40, 20, 20]
    gone_on = positions(session, 2)
    assert gone_on == sorted(set(gone_on)) == positions(session, 3, 1) and gone_on[-8:] == list(range(32, 40))
    for _, cos in whole[2:]:
        assert torch.equal(cos[0], whole[0][1][0, gone_on])
    attention = session.trace.table("attention")
    assert attention["q_len"].tolist() == attention["kv_read"].tolist() == [40, 40, 20, 20]
    assert attention["pairs"].tolist() == [820, 820, 210, 210]


def test_choices_are_of_the_tokens_that_reach_each_layer(tiny):
    """The layer that thins still sends all of the prompt through its experts, those after it what goes on."""
    mixture = wb.load((random_model("mixtral", num_hidden_layers=4), tiny.tokenizer))
    session = wb.Session(mixture, wb.FastKV(budget=0.5, rate=0.5), routing="choices")
    session.prefill([ids(PROMPT)[0].tolist(), ids(PROMPT)[0, :20].tolist()])
    choices = session.trace.table("choices")
    for row, length in enumerate([PROMPT, 20]):
        of_row = choices[choices["row"] == row].groupby("layer")["position"].agg(list)
        assert of_row[0] == of_row[1] == list(range(length))
        for layer in (2, 3):
            held = session._cache.layers[layer].store.positions[row, 0]
            assert of_row[layer] == held[held >= 0].tolist()


def test_tokens_that_do_not_go_on_are_as_if_hidden(lm):
    """The logits are those of plain attention over everything, with the same keys masked in the later layers."""
    session = prefilled(lm, wb.FastKV(budget=0.5, rate=0.5))
    gone_on = torch.tensor(positions(session, 2))
    mask = torch.full((PROMPT, PROMPT), -torch.inf).triu(1)
    thin = mask.clone()
    thin[:, [j for j in range(PROMPT) if j not in set(gone_on.tolist())]] = -torch.inf
    thin[torch.arange(PROMPT), torch.arange(PROMPT)] = 0.0
    masks = [mask, mask, thin, thin]
    hooks = [
        block.register_forward_pre_hook(
            lambda _, args, kwargs, mask=mask: (args, {**kwargs, "attention_mask": mask[None, None]}), with_kwargs=True
        )
        for block, mask in zip(decoder_layers(lm.model), masks, strict=True)
    ]
    try:
        with torch.no_grad():
            expected = lm.model(ids(PROMPT)).logits[0, -1]
    finally:
        for hook in hooks:
            hook.remove()
    torch.testing.assert_close(session.logits[0], expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("budget", "rate"), [(0.1, 0.2), (0.23, 0.5), (0.37, 0.2), (0.5, 0.9)])
def test_every_layer_stores_about_its_share(lm, budget, rate):
    for length in (100, 57):
        session = prefilled(lm, wb.FastKV(budget=budget, rate=rate), ids(length))
        assert all(abs(layer.store.length - int(budget * length)) <= 1 for layer in session._cache.layers)


def test_a_budget_in_tokens_lets_a_number_of_tokens_go_on(lm):
    session = prefilled(lm, wb.FastKV(budget=10, length=25))
    assert session.trace.table("attention")["q_len"].tolist() == [40, 40, 25, 25]
    assert [layer.store.length for layer in session._cache.layers] == [10] * 4
    assert prefilled(lm, wb.FastKV(budget=10)).trace.table("attention")["q_len"].tolist() == [40] * 4


def test_without_thinning_it_is_snapkv(lm):
    options = dict(budget=0.3, window=8, kernel=7, pooling="max")
    fast, snap = prefilled(lm, wb.FastKV(before=1.0, **options)), prefilled(lm, wb.SnapKV(**options))
    assert torch.equal(fast.logits, snap.logits)
    for ours, theirs in zip(fast._cache.layers, snap._cache.layers, strict=True):
        assert torch.equal(ours.store.positions, theirs.store.positions)
    assert torch.equal(fast.step([3]), snap.step([3]))


def test_the_selection_worked_example():
    """Keys e_j and queries log p: two heads give .6 and .1 to token 0, .1 and .5 to token 2; together token 0 leads."""
    rows = torch.tensor([[[0.6, 0.05, 0.1, 0.25]], [[0.1, 0.15, 0.5, 0.25]]])
    keys = torch.eye(4).expand(1, 2, 4, 4)
    state = LayerState(
        keys, keys, torch.arange(4).expand(1, 2, 4), torch.tensor([2]), 1.0, 0, 2, "prefill", rows.log().view(1, 2, 1, 4)
    )
    method = wb.FastKV(budget=2, length=2, window=1, kernel=1)
    keep, passing = method.keep_and_pass(state)
    assert keep[0].nonzero()[:, 1].tolist() == [0, 3, 2, 3] and passing[0].nonzero().flatten().tolist() == [0, 3]
    _, passing = dataclasses.replace(method, length=3).keep_and_pass(state)
    assert passing[0].nonzero().flatten().tolist() == [0, 2, 3]


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_prefill_flops_shrink_and_are_those_torch_counts(tiny, family):
    lm = wb.load((random_model(family, experts_implementation="eager"), tiny.tokenizer))
    flops = {}
    for method in (wb.FastKV(budget=0.3, rate=0.3), wb.FastKV(budget=0.3, rate=1.0)):
        session = wb.Session(lm, method)
        with FlopCount() as counter:
            session.prefill(ids(PROMPT))
            session.step()
        assert session.trace.flops() == counter.flops
        by = session.trace.flops(by=["step", "layer", "component"]).set_index(["step", "layer", "component"])["flops"]
        flops[method.rate] = by
    inner = "mlp" if family == "llama" else "experts"
    for component in (inner, "attention.qkv", "attention.out"):
        assert flops[0.3][0, 1, component] == flops[1.0][0, 1, component]
        assert flops[0.3][0, 2, component] * PROMPT == flops[1.0][0, 2, component] * 12
    assert flops[0.3][0, 2, "attention.scores"] * PROMPT**2 == flops[1.0][0, 2, "attention.scores"] * 12**2


def test_a_batch_is_thinned_like_each_prompt_alone(lm):
    prompts = [ids(length, seed=length)[0].tolist() for length in (40, 9, 23)]
    method = wb.FastKV(budget=0.3, rate=0.5, window=4)
    together = prefilled(lm, method, prompts)
    for row, prompt in enumerate(prompts):
        alone = prefilled(lm, method, prompt)
        torch.testing.assert_close(together.logits[row], alone.logits[0], atol=1e-5, rtol=1e-5)
        for ours, theirs in zip(together._cache.layers, alone._cache.layers, strict=True):
            for head in range(2):
                assert set(ours.store.positions[row, head].tolist()) - {-1} == set(theirs.store.positions[0, head].tolist())
    # half of 40, 9 and 23 tokens go on, rounded down, causally
    pairs = together.trace.table("attention").query("layer == 3")["pairs"].item()
    assert pairs == sum(count * (count + 1) // 2 for count in (20, 4, 11))


def test_the_trace_lists_what_did_not_go_on_as_evicted(lm):
    trace = prefilled(lm, wb.FastKV(budget=0.3, rate=0.5)).trace
    gone = trace.table("evictions").groupby(["layer", "head"])["position"].agg(["count", "nunique"])
    assert (gone == 28).all(axis=None) and len(gone) == 4 * 2
    cache = trace.table("cache").query("op == 'evict'")
    assert cache["held_tokens"].tolist() == [24] * 4 and cache["op_tokens"].tolist() == [56] * 4


def test_it_fires_in_a_comparison_with_less_prefill(tiny):
    workload = wb.workloads.recall(context=96, samples=1, facts=1)
    _, fast, snap = wb.compare(tiny, workload, [wb.FastKV(budget=0.2), wb.SnapKV(budget=0.2)]).rows
    assert fast.fired_layers == fast.layers == 4
    assert fast.prefill_flops < snap.prefill_flops


def test_appended_turns_and_branches_go_on_whole(lm):
    session = prefilled(lm, wb.FastKV(budget=0.3, rate=0.5))
    before = footprint(lm.model)
    fork = session.branch()
    assert torch.equal(fork.append([5, 6, 7]), session.append([5, 6, 7]))
    assert session.trace.table("attention").query("step == 1")["q_len"].tolist() == [3] * 4
    assert positions(session, 3)[-3:] == [40, 41, 42] and footprint(lm.model) == before


def test_models_that_cannot_be_thinned_are_refused_in_one_sentence(tiny):
    for model, why in ((random_model("gpt2"), "it failed with"), (random_gemma(), "layer 2 sees a sliding window")):
        before = footprint(model)
        lm = wb.load((model, tiny.tokenizer))
        with pytest.raises(wb.UserError, match=f"cannot go on with some tokens only after layer 1: {why}"):
            wb.Session(lm, wb.FastKV())
        session = wb.Session(lm)
        with pytest.raises(wb.UserError, match="choose another method"):
            session.swap(wb.FastKV())
        assert session.setup == wb.Setup() and footprint(model) == before
        wb.Session(lm, wb.FastKV(before=1.0))


def test_a_model_that_looks_at_its_tokens_from_outside_is_found_out(tiny):
    """Layers that add something by slot, which no argument tells, would give wrong numbers without an error."""
    model = random_llama()
    lm = wb.load((model, tiny.tokenizer))
    wb.Session(lm)
    hooks = [
        block.register_forward_hook(
            lambda _, args, out: out + torch.arange(out.shape[1])[:, None].sin() * torch.ones(32).cumsum(0).cos()
        )
        for block in decoder_layers(model)
    ]
    with pytest.raises(wb.UserError, match=r"its logits are .*% off from those with the same tokens hidden"):
        wb.Session(lm, wb.FastKV())
    for hook in hooks:
        hook.remove()


def test_a_replay_is_refused(lm):
    recording = wb.record(lm, ids(PROMPT), new_tokens=2)
    with pytest.raises(wb.UserError, match="changes what later layers compute"):
        wb.replay(recording, ["fastkv"])


THINNABLE = (
    "llama qwen2 qwen3 phi3 gpt_neox olmo2 starcoder2 smollm3 mixtral qwen2_moe qwen3_moe olmoe granitemoe llama4_text opt"
)


@pytest.mark.parametrize("family", THINNABLE.split())
def test_many_families_can_be_thinned(tiny, family):
    session = prefilled(wb.load((random_model(family), tiny.tokenizer)), wb.FastKV(budget=0.3, rate=0.5))
    assert session.trace.table("attention")["q_len"].tolist() == [40, 40, 20]
