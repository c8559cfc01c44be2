"""Where a method pays: arithmetic by hand, the same seconds as a prediction gives, and what no budget can change."""

from __future__ import annotations

from dataclasses import replace

import pytest

import workbench as wb
from workbench.cost.crossover import DENSE, crossover
from workbench.cost.hardware import Hardware
from workbench.cost.plan import Plan
from workbench.cost.under_method import LayerCosts, under
from workbench.testing import random_gemma, random_qwen_moe
from workbench.trace.anatomy import Anatomy, Attention, Layer, Linear

DEVICE = Hardware("d", "d", {"fp32": 1e12, "bf16": 1e12}, 100.0, 10**12, 2**16, ())
"""Compute is nearly free, and a second moves 100 bytes."""


def anatomy(num_layers: int = 1) -> Anatomy:
    """d=4, 2 query and 1 kv head of 2, f=6, V=10, float32."""
    attention = Attention(num_q_heads=2, num_kv_heads=1, head_dim=2, value_dim=2)
    linears = (Linear("attention.qkv", 4, 8), Linear("attention.out", 4, 4), Linear("mlp", 4, 6), Linear("mlp", 6, 4))
    layers = tuple(Layer(index, attention, linears, norms=(4, 4)) for index in range(num_layers))
    return Anatomy("Tiny", "tiny", "float32", 4, 4, 10, 64, 200, layers, (4,), Linear("lm_head", 4, 10))


def keeping(tokens: int, scoring_bytes: int = 0, layers: tuple[int, ...] = (0,)):
    """A method that holds so many tokens once a longer prompt is read, for so many bytes of scoring a prompt."""

    def says(_: Anatomy, prompt: int, seen: list[int]) -> dict[int, LayerCosts]:
        held = (prompt, *(min(prompt, tokens) + each - prompt for each in seen))
        none = (0,) * len(held)
        return {layer: LayerCosts(held, held, none, (scoring_bytes, *none[1:]), none) for layer in layers}

    return says


def test_one_step_by_hand():
    found = crossover(anatomy(), DEVICE, {"a": keeping(10, 4000)}, contexts=[10, 100], new_tokens=1).table
    rows = found.set_index(["method", "context"])
    # a decode step reads 101 tokens' K and V densely, and 11 under the method: 90 * 4 elements * 4 bytes / 100 bytes a second
    assert rows["step_s"][DENSE, 100] - rows["step_s"]["a", 100] == pytest.approx(90 * 4 * 4 / 100)
    assert rows["prefill_s"]["a", 100] - rows["prefill_s"][DENSE, 100] == pytest.approx(40)
    assert (rows["total_s"] - rows["prefill_s"] - rows["step_s"]).abs().max() < 1e-9
    assert rows["kv_bytes"][DENSE, 100] == 101 * 4 * 4 and rows["kv_bytes"]["a", 100] == 11 * 4 * 4


def test_it_pays_from_where_what_it_saves_passes_what_scoring_costs():
    # n steps save n * (context - 10) * 16 bytes: 8 steps make up for 12,800 bytes from more than 110 tokens on
    methods = {"late": keeping(10, 12_800), "free": keeping(1), "never": keeping(10**6, 1)}
    found = crossover(anatomy(), DEVICE, methods, contexts=[16, 64, 256, 1024], new_tokens=8)
    ((start, end),) = found.pays["late"]
    assert 110 < start <= 112 and end == 1024
    assert found.pays["free"] == ((16, 1024),) and found.pays["never"] == ()
    assert found.sentence("late").startswith(f"late pays from about {start} tokens on, with 8 new tokens: at 1,024 tokens")
    assert "at every context shown" in found.sentence("free") and "does not pay at any" in found.sentence("never")


def test_a_method_may_stop_paying():
    def says(_: Anatomy, prompt: int, seen: list[int]) -> dict[int, LayerCosts]:
        held = (prompt, *(each // 2 for each in seen))
        none = (0,) * len(held)
        return {0: LayerCosts(held, held, none, (prompt**2 // 10, *none[1:]), none)}

    # 8 steps save about 8 * 16 * context / 2 bytes, and scoring costs a tenth of context squared: less below 640 tokens
    found = crossover(anatomy(), DEVICE, {"a": says}, contexts=[16, 256, 4096], new_tokens=8)
    ((start, end),) = found.pays["a"]
    assert start == 16 and 600 < end < 680 and f"pays up to about {end} tokens" in found.sentence("a")


@pytest.mark.parametrize("model", [random_gemma, random_qwen_moe])
def test_seconds_are_those_of_a_prediction(model):
    """Though layers that are alike are priced once, and many contexts together."""
    from workbench.experiments.planned import planned
    from workbench.models.anatomy import anatomy_of

    of_model = anatomy_of(model())
    methods = {
        name: planned(name) for name in ("snapkv:budget=0.2,window=4", "pyramidkv:budget=0.5,window=4", "h2o:budget=0.3")
    }
    sizes = {"dtype": "bf16", "batch": 3, "new_tokens": 12}
    found = crossover(of_model, "h100-sxm", methods, contexts=[24, 333], **sizes).table.set_index(["method", "context"])
    for label, says in {DENSE: None, **methods}.items():
        for context in (24, 333):
            single = wb.predict(of_model, "h100-sxm", context=context, method=says, **sizes)
            prefill, decode = single.phases.set_index("phase")["predicted_s"][["prefill", "decode"]]
            row = found.loc[(label, context)]
            assert row["prefill_s"] == pytest.approx(prefill) and row["step_s"] == pytest.approx(decode / 12)
            assert row["total_s"] == pytest.approx(single.predicted_s)


def test_layers_that_differ_under_a_method_are_priced_apart():
    uneven = {"one": keeping(4, layers=(1,)), "both": keeping(4, layers=(0, 1))}
    rows = crossover(anatomy(2), DEVICE, uneven, contexts=[50, 60], new_tokens=1).table.set_index(["method", "context"])
    saved = rows["total_s"][DENSE] - rows["total_s"]["one"]
    assert (2 * saved).tolist() == pytest.approx((rows["total_s"][DENSE] - rows["total_s"]["both"]).tolist())


def test_under_a_method_rows_of_a_batch_cost_each():
    trace, _ = Plan(anatomy(), batch=3, context=20, new_tokens=2).trace()
    changed = under(trace, keeping(5, 100)(anatomy(), 20, [21, 22]))
    assert changed.table("attention")["kv_read"].tolist() == [20, 6, 7]
    assert changed.table("attention")["pairs"].tolist() == [3 * 210, 18, 21]
    assert changed.table("cache")["extra_bytes"].tolist() == [300]
    assert under(trace, {}) is trace


def test_what_cannot_be_asked():
    for given, why in (({"contexts": [5]}, "two or more"), ({"contexts": [5, 6], "new_tokens": 0}, "1 or more")):
        with pytest.raises(wb.UserError, match=why):
            crossover(anatomy(), DEVICE, {}, **given)
    with pytest.raises(wb.UserError, match="no fp8 peak"):
        crossover(anatomy(), replace(DEVICE), {}, contexts=[5, 6], dtype="fp8")
    with pytest.raises(wb.UserError, match="method; leave them out"):
        wb.predict(Plan(anatomy(), 1, 5, 1).trace()[0], DEVICE, method=keeping(3))
