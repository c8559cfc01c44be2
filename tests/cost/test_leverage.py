"""The Efficiency Leverage law: what was published of it, its shape, and a model's own numbers by hand."""

from __future__ import annotations

import math

import pytest

import workbench as wb
from workbench.cost.leverage import BEST_GRANULARITY, efficiency_leverage, flops_per_token, leverage_of
from workbench.models.anatomy import anatomy_of
from workbench.testing import ids, random_llama, random_model


def test_the_published_values():
    assert efficiency_leverage(0.031, 12, 1e22) == pytest.approx(7.24, abs=0.01)
    # log2(G) = 0.117 / (2 * 0.0167) = 3.503
    assert pytest.approx(11.3, abs=0.05) == BEST_GRANULARITY


def test_the_shape_of_the_law():
    assert efficiency_leverage(1, 12, 1e20) == pytest.approx(0.99, abs=0.01)
    ratios = [efficiency_leverage(activation, 12, 1e21) for activation in (0.01, 0.03, 0.1, 0.3, 1)]
    assert ratios == sorted(ratios, reverse=True)
    computes = [efficiency_leverage(0.03, 12, compute) for compute in (1e18, 1e20, 1e22, 1e24)]
    assert computes == sorted(computes)
    grains = [2**exponent for exponent in range(8)]
    values = [efficiency_leverage(0.03, grain, 1e21) for grain in grains]
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1]) and values[peak:] == sorted(values[peak:], reverse=True)
    assert abs(math.log2(grains[peak]) - math.log2(BEST_GRANULARITY)) < 1
    assert efficiency_leverage(0.03, BEST_GRANULARITY, 1e21) >= max(values)


def test_a_model_s_own_numbers():
    # 6 experts of 24 neurons, 2 a token, and 2 shared: A = 4 / 8, G = 2 * 32 / 24, S = 2 / 4
    anatomy = anatomy_of(random_model("deepseek_v3", n_shared_experts=2))
    found = leverage_of(anatomy, 1e20)
    assert (found.activation, found.granularity, found.shared) == pytest.approx((0.5, 64 / 24, 0.5))
    assert found.leverage == efficiency_leverage(0.5, 64 / 24, 1e20)
    # without shared experts: A = 2 / 6
    plain = leverage_of(anatomy_of(random_model("mixtral")), 1e20)
    assert (plain.activation, plain.shared) == pytest.approx((1 / 3, 0))
    # a layer: q 32 x 32, k and v 32 x 16, o 32 x 32, gate 32 x 6; two experts of 3 x 32 x 48; 2 FLOPs each, 3 layers
    assert plain.flops_per_token == 3 * 2 * (2 * 32 * 32 + 2 * 32 * 16 + 32 * 6 + 2 * 3 * 32 * 48)


def test_flops_a_token_are_those_of_a_trace_without_scores_and_head():
    model = random_model("qwen2_moe")
    with wb.profile(model) as prof:
        model(ids(6))
    by_component = prof.trace.flops(by="component").set_index("component")["flops"]
    assert 6 * flops_per_token(prof.trace.anatomy) == by_component.drop(["attention.scores", "lm_head"]).sum()


@pytest.mark.parametrize("numbers", [(0, 12, 1e20), (1.5, 12, 1e20), (0.1, 0, 1e20), (0.1, 12, -1)])
def test_numbers_that_are_none_get_a_sentence(numbers):
    with pytest.raises(wb.UserError, match="is none; give one above 0"):
        efficiency_leverage(*numbers)


def test_a_dense_model_gets_a_sentence():
    with pytest.raises(wb.UserError, match="LlamaForCausalLM is dense"):
        leverage_of(anatomy_of(random_llama()), 1e20)
