"""Sessions: dense equals plain generate, batches equal single prompts, and nothing is left on the model."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import workbench as wb
from workbench.testing import SMALL, ids

EVICTING = [cls for cls in wb.METHODS.values() if cls.slot == "cache" and cls is not wb.Dense and cls is not wb.LookaheadKV]
METHODS = [wb.Dense(), wb.LookaheadKV(budget=0.4, mode="pseudo"), *(cls(budget=0.4) for cls in EVICTING)]


def plain_generate(lm: wb.LM, prompt: torch.Tensor, num_tokens: int) -> list[int]:
    out = lm.model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=num_tokens, do_sample=False)
    return out[0, prompt.shape[1] :].tolist()


def fitting(method, lm: wb.LM):
    """The method, told to thin nothing if that model has layers that cannot be thinned."""
    slides = any(layer.attention.window for layer in lm.anatomy.layers)
    return dataclasses.replace(method, before=1.0) if method.name == "fastkv" and slides else method


def generate_alone(lm: wb.LM, method, prompt: list[int], num_tokens: int) -> tuple[int, ...]:
    session = wb.Session(lm, method)
    session.prefill(prompt)
    return session.generate(num_tokens).ids[0]


@pytest.mark.parametrize("length", [1, 7, 16, 17, 40])
def test_dense_equals_plain_generate(random_lm, length):
    prompt = ids(length)
    assert list(generate_alone(random_lm, None, prompt[0].tolist(), 24)) == plain_generate(random_lm, prompt, 24)


def test_dense_equals_plain_generate_on_the_trained_model(tiny):
    prompt = tiny.encode("The order of evaluation is\nRemember: amber anchor apple badger.\nas follows.\nRecall: amber")
    session = wb.Session(tiny)
    session.prefill(prompt["input_ids"])
    assert list(session.generate(20).ids[0]) == plain_generate(tiny, prompt["input_ids"], 20)
    assert session.tokens[0][-20:-17] == tiny.tokenizer(" anchor apple badger", add_special_tokens=False).input_ids


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_batch_equals_each_prompt_alone(random_lm, method):
    prompts = [ids(length, seed=length)[0].tolist() for length in (40, 9, 23)]
    method = fitting(method, random_lm)
    session = wb.Session(random_lm, method)
    session.prefill(prompts)
    together = session.generate(12)
    assert list(together.ids) == [generate_alone(random_lm, method, prompt, 12) for prompt in prompts]


@pytest.mark.parametrize("method", METHODS[1:], ids=lambda method: method.name)
def test_kept_tokens_do_not_depend_on_the_batch(random_lm, method):
    prompts = [ids(length, seed=length)[0].tolist() for length in (40, 23)]
    method = fitting(method, random_lm)
    together = wb.Session(random_lm, method)
    together.prefill(prompts)
    for row, prompt in enumerate(prompts):
        alone = wb.Session(random_lm, method)
        alone.prefill(prompt)
        for batched, single in zip(together._cache.layers, alone._cache.layers, strict=True):
            for head in range(single.store.positions.shape[1]):
                kept = {position for position in batched.store.positions[row, head].tolist() if position >= 0}
                assert kept == set(single.store.positions[0, head].tolist()) - {-1}


def test_plain_generate_between_steps_and_interleaved_sessions(random_lm):
    prompt, other = ids(30)[0].tolist(), ids(30, seed=5)[0].tolist()
    methods = [fitting(method, random_lm) for method in METHODS]
    expected = {method.name: generate_alone(random_lm, method, prompt, 8) for method in methods}
    plain = plain_generate(random_lm, ids(30, seed=5), 8)
    sessions = {method.name: wb.Session(random_lm, method) for method in methods}
    for session in sessions.values():
        session.prefill(prompt)
    got: dict[str, list[int]] = {name: [] for name in sessions}
    for _ in range(8):
        for name, session in sessions.items():
            got[name].append(session.logits.argmax(-1).item())
            session.step()
        assert plain_generate(random_lm, torch.tensor([other]), 8) == plain
    assert {name: tuple(tokens) for name, tokens in got.items()} == expected


def test_model_is_left_as_found_after_an_error(random_lm):
    session = wb.Session(random_lm)
    session.prefill([2, 3, 4])
    before = random_lm.model.config._attn_implementation
    with pytest.raises(IndexError):
        session.step([10**6])
    assert random_lm.model.config._attn_implementation == before
    assert not any(module._forward_pre_hooks for module in random_lm.model.modules())
    with pytest.raises(wb.UserError, match="did not finish"):
        session.step([2])


def test_append_equals_one_long_prompt(random_lm):
    prompt = ids(33)[0].tolist()
    whole = wb.Session(random_lm).prefill(prompt)
    session = wb.Session(random_lm)
    session.prefill(prompt[:20])
    torch.testing.assert_close(session.append(prompt[20:]), whole, atol=1e-5, rtol=1e-5)
    assert session.trace.table("steps")["phase"].tolist() == ["prefill", "append"]


def test_branch_shares_nothing(random_lm):
    session = wb.Session(random_lm, wb.H2O(budget=0.4))
    session.prefill(ids(30)[0].tolist())
    expected = session.branch().generate(10).ids
    fork = session.branch()
    fork.append([5, 6, 7])
    fork.generate(3)
    assert session.generate(10).ids == expected
    assert fork.trace.table("steps")["step"].min() == 1


def test_on_token_streams_every_token(tiny):
    session = wb.Session(tiny)
    session.prefill("Return a string")
    streamed = []
    generated = session.generate(5, on_token=lambda tokens: streamed.extend(tokens))
    assert tuple(streamed) == generated.ids[0]
    assert generated.text == tiny.tokenizer.decode(streamed)


def test_trace_of_a_session(tiny):
    session = wb.Session(tiny, wb.SnapKV(budget=20, window=8))
    session.prefill(ids(60)[0].tolist())
    session.generate(4)
    trace = session.trace
    assert trace.summary()["phase"].tolist() == ["prefill", "decode"]
    assert trace.table("tokens")["position"].tolist() == list(range(64))
    evicted = trace.table("evictions").groupby(["layer", "head"]).size()
    assert (evicted == 40).all() and len(evicted) == 4 * 2
    assert trace.table("tokens")["logprob"].notna().sum() == 4


def test_flops_of_a_dense_session_equal_the_profiled_model(random_lm):
    prompt = ids(25)
    with wb.profile(random_lm.model) as prof, torch.no_grad():
        cache = random_lm.model(prompt, use_cache=True, logits_to_keep=1).past_key_values
        random_lm.model(ids(1), past_key_values=cache, logits_to_keep=1)
    session = wb.Session(random_lm)
    session.prefill(prompt)
    session.step([3])
    no_window = all(layer.attention.window is None for layer in random_lm.anatomy.layers)
    if no_window:
        assert session.trace.flops() == prof.trace.flops()
    assert session.trace.flops(convention="causal") == prof.trace.flops(convention="causal")


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda s: s.prefill(""), "prompt is empty"),
        (lambda s: s.prefill([]), "prompt is empty"),
        (lambda s: s.step(), "call prefill"),
        (lambda s: s.append("x"), "call prefill"),
        (lambda s: s.prefill(list(range(2, 90)) * 100), "context of 8192"),
        (lambda s: (s.prefill("x"), s.prefill("y")), "has its prompt already"),
        (lambda s: (s.prefill("x"), s.generate(0)), "generate 0 tokens"),
        (lambda s: (s.prefill("x"), s.step([1, 2])), "one token for each of the 1 rows"),
    ],
)
def test_misuse_is_one_sentence(tiny, use, message):
    with pytest.raises(wb.UserError, match=message):
        use(wb.Session(tiny))


def test_two_methods_of_one_slot():
    with pytest.raises(wb.UserError, match=r"'h2o' and 'snapkv' are both cache methods"):
        wb.Setup(wb.H2O(), wb.SnapKV())
    with pytest.raises(wb.UserError, match="is not a method"):
        wb.Setup("h2o")


def test_a_model_with_a_cache_of_its_own_is_refused_in_a_sentence(tiny):
    sizes = {"num_local_experts": 4, "head_dim": 8, "layer_types": ["full_attention"] * 3}
    config = AutoConfig.for_model("minimax", **{**SMALL, **sizes, "vocab_size": len(tiny.tokenizer)})
    lm = wb.load((AutoModelForCausalLM.from_config(config).eval(), tiny.tokenizer))
    with pytest.raises(wb.UserError, match="MiniMax uses cache of its own"):
        wb.Session(lm)
