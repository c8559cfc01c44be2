"""`wb.profile` sees every call and leaves the model as it was, whatever happens inside."""

from __future__ import annotations

import threading

import pytest
import torch
from transformers import AttentionInterface

import workbench as wb
from workbench.testing import RANDOM_MODELS, ids, random_llama, random_qwen_moe
from workbench.trace.pairs import causal_pairs


def test_output_is_unchanged(random_lm):
    prompt = ids(30)
    with torch.no_grad():
        expected = random_lm.model(prompt).logits
        with wb.profile(random_lm.model, importance="full"):
            assert torch.equal(random_lm.model(prompt).logits, expected)
        assert torch.equal(random_lm.model(prompt).logits, expected)


def test_generate_and_a_loop_give_the_same_trace(random_lm):
    prompt = ids(12)
    with wb.profile(random_lm.model) as generated:
        random_lm.model.generate(prompt, max_new_tokens=4, do_sample=False)
    with wb.profile(random_lm.model) as looped, torch.no_grad():
        out = random_lm.model(prompt, use_cache=True, logits_to_keep=1)
        for _ in range(3):
            token = out.logits[:, -1].argmax(-1, keepdim=True)
            out = random_lm.model(token, past_key_values=out.past_key_values, logits_to_keep=1)
    for name in ("attention", "cache", "routing"):
        left, right = generated.trace.table(name), looped.trace.table(name)
        columns = [column for column in left if column != "physical_bytes" and not column.startswith("mask")]
        assert left[columns].equals(right[columns]), name
    assert generated.trace.table("tokens")["position"].tolist() == list(range(15))


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_exceptions_leave_nothing(error):
    model = random_llama()
    functions = set(AttentionInterface._global_mapping)

    def fail(*_):
        raise error("stop")

    handle = model.model.layers[1].mlp.register_forward_hook(fail)
    with pytest.raises(error), wb.profile(model) as prof:
        model(ids(5))
    handle.remove()
    assert set(AttentionInterface._global_mapping) == functions
    assert model.config._attn_implementation == "sdpa"
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert prof.trace.table("steps").empty and "stop" in prof.trace.meta["error"]


def test_nested_profiles_both_see():
    model = random_llama()
    with wb.profile(model) as outer, torch.no_grad():
        model(ids(5))
        with wb.profile(model) as inner:
            model(ids(6))
    assert inner.trace.table("steps")["tokens"].tolist() == [6]
    assert outer.trace.table("steps")["tokens"].tolist() == [5, 6]
    assert outer.trace.flops(by="step")["flops"].iloc[1] == inner.trace.flops()


def test_two_threads_two_models():
    models = [random_llama(), random_qwen_moe()]
    traces = {}

    def run(index: int) -> None:
        with wb.profile(models[index]) as prof, torch.no_grad():
            for length in range(3, 9):
                models[index](ids(length))
        traces[index] = prof.trace

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for trace in traces.values():
        assert trace.table("steps")["tokens"].tolist() == list(range(3, 9))
        assert len(trace.table("attention")) == 6 * 3


def test_profile_around_a_session(random_lm):
    prompt = ids(20)[0].tolist()
    expected = wb.Session(random_lm).prefill(prompt)
    with wb.profile(random_lm.model) as prof:
        session = wb.Session(random_lm, wb.StreamingLLM(budget=0.5))
        assert torch.equal(session.prefill(prompt), expected)
        session.step()
    for column in ("phase", "context"):
        assert prof.trace.table("steps")[column].tolist() == session.trace.table("steps")[column].tolist()
    observed = prof.trace.table("attention").query("step == 1")
    assert observed["kv_read"].tolist() == session.trace.table("attention").query("step == 1")["kv_read"].tolist()


@pytest.mark.parametrize("name", RANDOM_MODELS)
@pytest.mark.parametrize("mode", ["window", "full"])
def test_importance_equals_eager_column_sums(name, mode):
    model = RANDOM_MODELS[name](attn_implementation="eager")
    prompt = ids(50)
    with torch.no_grad():
        attentions = model(prompt, output_attentions=True).attentions
        with wb.profile(model, importance=mode) as prof:
            model(prompt)
    table = prof.trace.table("importance")
    window = 50 if mode == "full" else 32
    assert (table["window"] == window).all() and len(table) == 3 * 4
    for row in table.itertuples():
        expected = attentions[row.layer][0, row.head, -window:].sum(0)
        torch.testing.assert_close(torch.tensor(row.mass).float(), expected, atol=2e-2, rtol=2e-3)  # stored as float16


def test_importance_of_decoded_tokens_only():
    model = random_llama()
    with wb.profile(model, importance="decode") as prof:
        model.generate(ids(10), max_new_tokens=3, do_sample=False)
    table = prof.trace.table("importance")
    assert set(table["step"]) == {1, 2} and (table["window"] == 1).all()
    assert [len(mass) for mass in table.query("step == 2 and layer == 0")["mass"]] == [12] * 4


def test_importance_of_a_padded_batch_and_a_static_cache():
    model = random_llama(attn_implementation="eager")
    prompt = ids(20, 2)
    mask = torch.ones_like(prompt)
    mask[0, :8] = 0
    with wb.profile(model, importance="full") as padded:
        model.generate(prompt, attention_mask=mask, max_new_tokens=3, do_sample=False)
    with wb.profile(model, importance="full") as alone:
        model.generate(prompt[:1, 8:], max_new_tokens=3, do_sample=False)
    left = padded.trace.table("importance").query("row == 0")["mass"]
    for batched, single in zip(left, alone.trace.table("importance")["mass"], strict=True):
        assert abs(batched[8:] - single).max() < 2e-3 and abs(batched[:8]).max() == 0
    with wb.profile(model, importance="full") as static:
        model.generate(prompt[:1, 8:], max_new_tokens=3, do_sample=False, cache_implementation="static")
    for fixed, single in zip(static.trace.table("importance")["mass"], alone.trace.table("importance")["mass"], strict=True):
        assert abs(fixed[: len(single)] - single).max() < 2e-3


def test_routing_equals_a_recomputation():
    model = random_qwen_moe()
    inputs = {}
    for layer, block in enumerate(model.model.layers):
        block.mlp.register_forward_pre_hook(lambda _, args, layer=layer: inputs.__setitem__(layer, args[0]))
    with wb.profile(model) as prof, torch.no_grad():
        model(ids(21))
    for layer, block in enumerate(model.model.layers):
        weights = (inputs[layer].flatten(0, 1) @ block.mlp.gate.weight.T).softmax(-1)
        chosen, index = weights.topk(2, -1)
        chosen = chosen / chosen.sum(-1, keepdim=True) if model.config.norm_topk_prob else chosen
        rows = prof.trace.table("routing").query("layer == @layer").set_index("expert")
        for expert in range(6):
            assert rows["tokens"][expert] == (index == expert).sum()
            assert rows["weight_sum"][expert] == pytest.approx(chosen[index == expert].sum().item(), abs=1e-4)


def test_refusals():
    with pytest.raises(wb.UserError, match="importance mode 'most'"):
        wb.profile(random_llama(), importance="most")
    with pytest.raises(wb.UserError, match="Linear is not a causal language model"):
        wb.profile(torch.nn.Linear(2, 2))


def test_streaming_to_disk_is_readable_before_the_end(tmp_path):
    model = random_llama()
    with wb.profile(model, out=tmp_path / "run.trace") as prof, torch.no_grad():
        for _ in range(70):
            model(ids(3))
        midway = wb.Trace.load(tmp_path / "run.trace")
        assert not midway.complete and len(midway.table("steps")) >= 64
    whole = wb.Trace.load(tmp_path / "run.trace")
    assert whole.complete and len(whole.table("steps")) == 70
    assert whole.flops() == prof.trace.flops()
    assert whole.meta["own_overhead"]["own_ns"] > 0


@pytest.mark.parametrize("window", [None, 1, 2, 3, 5, 20])
def test_causal_pairs_equal_a_count(window):
    for num_queries in range(1, 9):
        for num_slots in range(num_queries, 12):
            seen = [min(num_slots - num_queries + i + 1, window or num_slots) for i in range(num_queries)]
            assert causal_pairs(num_queries, num_slots, window) == sum(seen)
