"""Eager PyTorch at measured rates: by hand on made-up rates, and beside a measured run."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import workbench as wb
from workbench.cost.eager import kind_of
from workbench.cost.hardware import Hardware
from workbench.cost.plan import Plan
from workbench.cost.rates import ATTENTION, PASSES, Grid, Rates
from workbench.probes.environment import environment
from workbench.testing import ids, random_llama
from workbench.trace.anatomy import Anatomy, Attention, Layer, Linear


def flat(rate: float, axes: int = 1) -> Grid:
    return Grid(((1.0,),) * axes, (rate,))


RATES = Rates(
    products=flat(100.0, 3),
    reads=flat(1e9),
    passes={kind: flat(10.0) for kind in PASSES},
    attention={kind: flat(50.0, 2) for kind in ATTENTION},
    step_s=7.0,
    layer_s=3.0,
    slowdown=flat(1.0, 2),
)
SHEET = Hardware("this", "this", {"fp32": 100.0}, 1e9, 10**9, 2**16, (), rates={"fp32": RATES}, environment=environment())


def one_layer() -> Anatomy:
    """d=4, 2 query and 1 kv head of 2, f=6, V=10, float32."""
    attention = Attention(num_q_heads=2, num_kv_heads=1, head_dim=2, value_dim=2)
    linears = (Linear("attention.qkv", 4, 8), Linear("attention.out", 4, 4), Linear("mlp", 4, 6), Linear("mlp", 6, 4))
    return Anatomy(
        "Tiny", "tiny", "float32", 4, 4, 10, 64, 200, (Layer(0, attention, linears, (4, 4)),), (4,), Linear("lm_head", 4, 10)
    )


def test_eager_seconds_by_hand():
    seconds = wb.predict(one_layer(), SHEET, context=3, new_tokens=0).table.set_index("component")["predicted_s"]
    assert seconds["attention.qkv"] == pytest.approx(2 * 3 * 4 * 8 / 100)
    assert seconds["mlp"] == pytest.approx(2 * 2 * 3 * 4 * 6 / 100)
    assert seconds["lm_head"] == pytest.approx(2 * 1 * 4 * 10 / 100)
    assert seconds["norm"] == pytest.approx(3 * 3 * 4 / 10)  # two in the layer, one after it
    # residuals 2 * 3 * 4, rotary 3 * 3 heads * 2, activation 3 * 6 elements
    assert seconds["elementwise"] == pytest.approx((24 + 18 + 18) / 10)
    assert seconds["attention.scores"] == pytest.approx(6 * 2 * 2 * 4 / 50)  # 6 causal pairs
    assert seconds["cache"] == pytest.approx(3 * 4 / 10)
    assert seconds["overhead"] == pytest.approx(7 + 3)


def test_weights_come_no_faster_than_memory_gives_them():
    slow = replace(SHEET, rates={"fp32": replace(RATES, reads=flat(1.0))})
    seconds = wb.predict(one_layer(), slow, context=3, new_tokens=0).table.set_index("component")["predicted_s"]
    assert seconds["attention.qkv"] == pytest.approx(4 * 4 * 8)  # 32 weights of 4 bytes at a byte a second


def test_pieces_are_slower_inside_a_model_and_overhead_is_what_it_was():
    slow = replace(SHEET, rates={"fp32": replace(RATES, slowdown=Grid(((1.0, 3.0), (4.0,)), (1.0, 1.5)))})
    plain, slower = (wb.predict(one_layer(), sheet, context=3, new_tokens=1).table for sheet in (SHEET, slow))
    ratio = slower["predicted_s"] / plain["predicted_s"]
    prefill, overhead = plain["phase"] == "prefill", plain["component"] == "overhead"
    assert ratio[prefill & ~overhead].tolist() == pytest.approx([1.5] * 9)  # three tokens
    assert ratio[~prefill].tolist() == pytest.approx([1.0] * 10) and ratio[overhead].tolist() == pytest.approx([1.0] * 2)


def test_transformers_cache_is_written_anew_at_every_step():
    decode = wb.predict(one_layer(), SHEET, context=30, new_tokens=1).table.set_index(["phase", "component"])
    assert decode.loc[("decode", "cache"), "predicted_s"] == pytest.approx(31 * 4 / 10)


def test_what_a_method_adds_is_priced_too(tiny):
    session = wb.Session(tiny, wb.H2O(budget=0.5))
    session.prefill(ids(40)[0].tolist())
    table = wb.predict(session.trace, SHEET).table.set_index("component")
    method = table.loc["method"]
    assert method["predicted_s"] == pytest.approx(max(method["compute_s"], method["memory_s"])) and method["flops"] > 0
    moved = session.trace.table("cache").query("op == 'evict'")["extra_bytes"].sum()
    appended = 40 * tiny.anatomy.kv_bytes_per_token / 4  # elements
    assert table.loc["cache", "predicted_s"] == pytest.approx((moved / 8 + appended) / 10)


def test_framework_time_is_bound_by_neither():
    table = wb.predict(one_layer(), SHEET, context=3, new_tokens=0).table.set_index("component")
    assert set(table.loc[["elementwise", "overhead"], "bound"]) == {"framework"}
    assert (table.loc[["elementwise", "overhead"], ["flops", "bytes"]] == 0).all(axis=None)


@pytest.mark.parametrize(
    ("call", "kind"),
    [
        (("sdpa", "causal", 8), "causal"),
        (("sdpa", "padded or sliding", 8), "masked"),
        (("sdpa", "causal", 1), "cached"),
        (("blockwise", "sliding", 8), "blockwise"),
        (("decode", "causal", 1), "decode"),
        (("eager", "causal", 8), "eager"),
        (("of the model's own", "assumed causal", 8), "causal"),
    ],
)
def test_kind_of_a_recorded_call(call, kind):
    assert kind_of(*call) == kind


def test_beside_a_measured_run():
    model = random_llama()
    with wb.profile(model) as prof, torch.no_grad():
        for _ in range(3):
            cache = model(ids(20), logits_to_keep=1).past_key_values
        model(ids(1), past_key_values=cache, logits_to_keep=1)
    table = wb.beside_measured(prof.trace, SHEET).set_index("phase")
    duration = prof.trace.table("steps")["duration_ns"] / 1e9
    assert table["steps"].to_dict() == {"prefill": 3, "decode": 1}
    prefill = table.loc["prefill"]
    assert prefill["measured_s"] == pytest.approx(duration[:3].median())
    assert (prefill["measured_low_s"], prefill["measured_high_s"]) == pytest.approx((duration[:3].min(), duration[:3].max()))
    assert prefill["predicted_s"] == pytest.approx(wb.predict(prof.trace, SHEET).phases.loc[0, "predicted_step_s"])
    assert prefill["error_percent"] == pytest.approx(100 * (prefill["predicted_s"] / prefill["measured_s"] - 1))


def test_what_cannot_stand_beside_a_measurement():
    model = random_llama()
    with wb.profile(model) as prof, torch.no_grad():
        model(ids(4))
    with pytest.raises(wb.UserError, match="was not measured"):
        wb.beside_measured(prof.trace, "h100-sxm")
    with pytest.raises(wb.UserError, match=r"measured on .* 63 threads"):
        wb.beside_measured(prof.trace, replace(SHEET, environment={**environment(), "threads": 63}))
    trace, _ = Plan(one_layer(), 1, 4, 0).trace()
    trace.meta["environment"] = environment()
    with pytest.raises(wb.UserError, match="no measured times"):
        wb.beside_measured(trace, SHEET)
