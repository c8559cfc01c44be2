"""Predictions: arithmetic by hand, identities, a plan equal to a recording, and questions no machine here could answer."""

from __future__ import annotations

import json
from dataclasses import replace

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, MixtralConfig

import workbench as wb
from workbench.cost.hardware import Hardware
from workbench.cost.plan import MAX_STEPS, Plan
from workbench.cost.roofline import Memory
from workbench.models.anatomy import anatomy_of
from workbench.testing import ids, random_gemma, random_llama, random_model, random_qwen_moe
from workbench.trace.anatomy import Anatomy, Attention, Layer, Linear

DEVICE = Hardware("d", "d", {"fp32": 1000.0, "bf16": 2000.0}, 100.0, 10_000, 2**16, ())
SUMS = ["flops", "bytes", "compute_s", "memory_s", "predicted_s"]


@pytest.fixture(scope="module")
def llama70b() -> Anatomy:
    return wb.anatomy(
        LlamaConfig(
            hidden_size=8192,
            num_hidden_layers=80,
            num_attention_heads=64,
            num_key_value_heads=8,
            intermediate_size=28672,
            vocab_size=128256,
            max_position_embeddings=131072,
            dtype="bfloat16",
        )
    )


def one_layer() -> Anatomy:
    """d=4, 2 query and 1 kv head of 2, f=6, V=10, float32."""
    attention = Attention(num_q_heads=2, num_kv_heads=1, head_dim=2, value_dim=2)
    linears = (Linear("attention.qkv", 4, 8), Linear("attention.out", 4, 4), Linear("mlp", 4, 6), Linear("mlp", 6, 4))
    layer = Layer(0, attention, linears, norms=(4, 4))
    return Anatomy("Tiny", "tiny", "float32", 4, 4, 10, 64, 200, (layer,), (4,), Linear("lm_head", 4, 10))


def test_one_layer_by_hand():
    table = wb.predict(one_layer(), DEVICE, context=3, new_tokens=1).table.set_index(["phase", "component"])
    # qkv of 3 tokens: 2 * 3 * 4 * 8 = 192 FLOPs; 4 * (3 * (4 + 8) + 4 * 8) = 272 bytes
    row = table.loc["prefill", "attention.qkv"]
    assert row[SUMS].tolist() == pytest.approx([192, 272, 0.192, 2.72, 2.72])
    assert row["bound"] == "memory" and row["intensity"] == pytest.approx(192 / 272)
    # scores of 3 tokens: 6 causal pairs * 2 heads * 2 * (2 + 2) = 96; 4 * (q and out 2 * 3 * 4 + K and V 1 * 3 * 4) = 144
    assert table.loc["prefill", "attention.scores"][["flops", "bytes"]].tolist() == [96, 144]
    # one decode step reads 4 keys: 4 pairs * 2 * 2 * 4 = 64; 4 * (2 * 1 * 4 + 1 * 4 * 4) = 96
    assert table.loc["decode", "attention.scores"][["flops", "bytes"]].tolist() == [64, 96]
    # the head computes one position a row: 2 * 4 * 10, and 4 * (4 + 10 + 40)
    assert table.loc["prefill", "lm_head"][["flops", "bytes"]].tolist() == [80, 216]
    # the cache takes K and V of 3 tokens, in and out: 2 * 4 * 3 * 4
    assert table.loc["prefill", "cache"]["bytes"] == 96


def test_memory_by_hand():
    prediction = wb.predict(one_layer(), DEVICE, batch=2, context=3, new_tokens=5)
    # 200 weights of 4 bytes; 2 rows * (3 + 5) tokens * 4 elements * 4 bytes
    assert prediction.memory == Memory(800, 256, 10_000) and prediction.memory.fits and prediction.memory.devices == 1
    assert Memory(801, 200, 1000).devices == 2 and not Memory(801, 200, 1000).fits


def test_what_binds_follows_the_device():
    slow_memory, slow_compute = replace(DEVICE, bandwidth=1.0), replace(DEVICE, peak_flops={"fp32": 1.0})
    for device, bound in ((slow_memory, "memory"), (slow_compute, "compute")):
        table = wb.predict(one_layer(), device, context=8).table
        assert set(table.loc[table["flops"] > 0, "bound"]) == {bound}


def test_doubling_the_bandwidth_halves_memory_bound_seconds(llama70b):
    plain = wb.hardware("h100-sxm")
    faster = replace(plain, bandwidth=2 * plain.bandwidth)
    before, after = (wb.predict(llama70b, device, new_tokens=4).table for device in (plain, faster))
    decode = before["phase"] == "decode"
    assert set(before.loc[decode, "bound"]) == {"memory"}
    assert after.loc[decode, "predicted_s"].to_numpy() == pytest.approx(before.loc[decode, "predicted_s"].to_numpy() / 2)
    still = (before["bound"] == "compute") & (after["bound"] == "compute")
    assert still.any() and (after.loc[still, "predicted_s"] == before.loc[still, "predicted_s"]).all()


def test_predicted_is_never_below_either_bound(llama70b):
    table = wb.predict(llama70b, "a100-80", batch=4).table
    assert (table["predicted_s"] >= table[["compute_s", "memory_s"]].max(axis=1) * (1 - 1e-12)).all()


@pytest.mark.parametrize(
    "model", [random_llama, random_gemma, lambda: random_model("gpt2"), lambda: random_model("deepseek_v3")]
)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_plan_equals_a_recording_of_the_same_sizes(model, batch):
    """Exactly, sliding windows included: the prompt is longer than Gemma's window of 16. Experts are compared elsewhere."""
    lm, context, new_tokens = model(), 40, 5
    with wb.profile(lm) as prof, torch.no_grad():
        cache = lm(ids(context, batch), logits_to_keep=1).past_key_values
        for _ in range(new_tokens):
            cache = lm(ids(1, batch), past_key_values=cache, logits_to_keep=1).past_key_values
    recorded = wb.predict(prof.trace, "a100-40")
    planned = wb.predict(anatomy_of(lm), "a100-40", batch=batch, context=context, new_tokens=new_tokens)
    tables = [each.table[each.table["component"] != "experts"].reset_index(drop=True) for each in (recorded, planned)]
    pd.testing.assert_frame_equal(*tables)
    assert recorded.memory == planned.memory
    assert recorded.phases["tokens"].tolist() == planned.phases["tokens"].tolist()


def test_a_plan_counts_experts_as_a_recording_where_routing_cannot_differ():
    """One token a row of one: exactly k experts are hit, in a recording and by expectation."""
    lm = random_qwen_moe()
    with wb.profile(lm) as prof, torch.no_grad():
        lm(ids(1), logits_to_keep=1)
    recorded = wb.predict(prof.trace, "a100-40").table
    planned = wb.predict(anatomy_of(lm), "a100-40", context=1, new_tokens=0).table
    pd.testing.assert_frame_equal(recorded, planned)
    assert (
        recorded.set_index("component").loc["experts", "flops"]
        == prof.trace.flops(by="component").set_index("component").loc["experts", "flops"]
    )
    assert (
        recorded.set_index("component").loc["experts", "bytes"]
        == prof.trace.bytes(by="component").set_index("component").loc["experts", "bytes"]
    )


def test_experts_of_a_mixture_in_decode():
    anatomy = wb.anatomy(
        MixtralConfig(num_hidden_layers=2, hidden_size=64, intermediate_size=128, vocab_size=100, dtype="bfloat16")
    )
    prediction = wb.predict(anatomy, "h100-sxm", batch=2, context=16, new_tokens=1)
    experts = prediction.table.set_index(["phase", "component"]).loc[("decode", "experts")]
    # 2 layers; weights of 3.5 of 8 experts, 3 * 64 * 128 elements of 2 bytes; activations of 2 tokens * 2 experts
    weights, activations = 3.5 * 3 * 64 * 128, 4 * ((64 + 256) + (128 + 64))
    assert experts["bytes"] == pytest.approx(2 * 2 * (weights + activations))
    assert experts["flops"] == 2 * 4 * 2 * 3 * 64 * 128
    assert any("independent routing" in note for note in prediction.notes)


def test_a_70b_model_from_its_config_alone(llama70b):
    assert llama70b.num_parameters == pytest.approx(70.55e9, rel=1e-3)
    prediction = wb.predict(llama70b, "h100-sxm", context=4096)
    decode = prediction.phases.set_index("phase").loc["decode"]
    # every decode step reads all weights but the embedding's: 2 * (70.55e9 - 1.05e9) bytes at 3.35 TB/s are 41.5 ms
    assert decode["predicted_step_s"] == pytest.approx(0.0415, rel=0.02)
    # the prompt is 2 * 69.5e9 * 4096 FLOPs and attention, at 989 TFLOP/s: 0.575 s and some
    assert 0.575 < prediction.phases.set_index("phase").loc["prefill", "predicted_s"] < 0.62
    assert prediction.memory.devices == 2


def test_a_context_of_a_million_tokens_answers_from_few_rows(llama70b):
    trace, _ = Plan(llama70b, 1, 1_000_000, 2000).trace()
    assert len(trace.table("attention")) == 80 * (1 + MAX_STEPS)
    prediction = wb.predict(llama70b, "h200", context=1_000_000, new_tokens=2000)
    # K and V: 1,002,000 tokens * 80 layers * 8 heads * 256 elements * 2 bytes
    assert prediction.memory.kv_bytes == 1_002_000 * 80 * 8 * 256 * 2
    assert any("own context is 131072" in note for note in prediction.notes)
    assert prediction.table["predicted_s"].notna().all()


def test_stretches_of_decode_steps_add_up(llama70b):
    small = replace(llama70b, layers=llama70b.layers[:2])
    every = wb.predict(small, "h100-sxm", context=100, new_tokens=MAX_STEPS).phases.set_index("phase").loc["decode"]
    prediction = wb.predict(small, "h100-sxm", context=100, new_tokens=8 * MAX_STEPS)
    many = prediction.phases.set_index("phase").loc["decode"]
    assert every["steps"] == MAX_STEPS and many["steps"] == many["tokens"] == 8 * MAX_STEPS
    trace, repeats = Plan(small, 1, 100, 8 * MAX_STEPS).trace()
    assert len(trace.table("steps")) == 1 + MAX_STEPS and repeats.sum() == 1 + 8 * MAX_STEPS
    # attention FLOPs grow with the context: the sum over 101 .. 2148, in the middle of stretches of 8 to half a token each
    exact = sum(range(101, 101 + 8 * MAX_STEPS)) * 2 * 2 * 64 * 256
    attention = prediction.table.set_index(["phase", "component"]).loc[("decode", "attention.scores"), "flops"]
    assert attention == pytest.approx(exact, rel=1e-3)


def test_dtype_changes_bytes_and_peak():
    wide, narrow = (wb.predict(one_layer(), DEVICE, dtype=dtype, context=4, new_tokens=2) for dtype in ("fp32", "bf16"))
    assert wide.memory.needed_bytes == 2 * narrow.memory.needed_bytes
    assert (wide.table["compute_s"] == 2 * narrow.table["compute_s"]).all()
    assert wide.table["flops"].equals(narrow.table["flops"])


def test_dtype_of_a_recorded_run_with_a_method(tiny):
    session = wb.Session(tiny, wb.H2O(budget=0.5))
    session.prefill(ids(40)[0].tolist())
    session.generate(3)
    wide, narrow = (
        wb.predict(session.trace, "h100-sxm", dtype=dtype).table.set_index(["phase", "component"]) for dtype in ("fp32", "bf16")
    )
    assert (
        wide.loc[("prefill", "method"), "bytes"]
        == session.trace.bytes(by=["phase", "component"]).set_index(["phase", "component"]).loc[("prefill", "method"), "bytes"]
    )
    assert narrow.loc[("prefill", "method"), "bytes"] == pytest.approx(wide.loc[("prefill", "method"), "bytes"] / 2, rel=1e-3)


def test_on_chip_bytes_reach_the_attention_model():
    trace, _ = Plan(one_layer(), 1, 512, 0).trace()
    small, large = (
        wb.predict(one_layer(), replace(DEVICE, on_chip_bytes=size), context=512, new_tokens=0) for size in (2**10, 2**20)
    )
    moved = [each.table.set_index("component").loc["attention.scores", "bytes"] for each in (small, large)]
    assert moved == [
        trace.bytes(by="component", on_chip_bytes=size).set_index("component").loc["attention.scores", "bytes"]
        for size in (2**10, 2**20)
    ]
    assert moved[0] > moved[1]
    with pytest.raises(wb.UserError, match="cannot use 0 on-chip bytes"):
        trace.bytes(on_chip_bytes=0)


def test_a_prediction_is_json_ready(llama70b):
    found = json.loads(json.dumps(wb.predict(llama70b, "b200", dtype="fp8").to_dict()))
    assert found["dtype"] == "fp8" and found["memory"]["fits"] and found["sources"]
    assert {row["phase"] for row in found["components"]} == {"prefill", "decode"}
    assert not [
        name for row in found["components"] + found["phases"] for name in row if "measured" in name or "duration" in name
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch": 0}, "batch cannot be 0"),
        ({"context": -1}, "context cannot be -1"),
        ({"new_tokens": -1}, "new_tokens cannot be -1"),
        ({"dtype": "fp9"}, "no dtype 'fp9'"),
        ({"dtype": "fp8"}, "has no fp8 peak"),
        ({"context": 10**9, "batch": 10**4}, "more than can be counted"),
    ],
)
def test_impossible_questions(options, message):
    with pytest.raises(wb.UserError, match=message):
        wb.predict(one_layer(), "a100-80", **options)


def test_a_trace_has_its_own_sizes():
    trace, _ = Plan(one_layer(), 1, 4, 1).trace()
    with pytest.raises(wb.UserError, match="its own batch"):
        wb.predict(trace, DEVICE, context=4)
