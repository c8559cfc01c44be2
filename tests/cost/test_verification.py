"""MoESD's counts, target efficiency and speed-up: by hand, and on recorded steps."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers import DynamicCache

import workbench as wb
from workbench.cost.routing import expected_unique
from workbench.cost.verification import (
    mean_load,
    saturation_tokens,
    seen_beside_expected,
    speed_up,
    step_bytes,
    step_seconds,
    target_efficiency,
)
from workbench.models.anatomy import anatomy_of, router_modules
from workbench.testing import ids, random_gemma, random_llama, random_model


@pytest.fixture(scope="module")
def moe():
    return anatomy_of(random_model("mixtral"))


def with_top_k(anatomy, top_k, num_experts=None):
    layers = [
        replace(each, experts=replace(each.experts, top_k=top_k, num_experts=num_experts or each.experts.num_experts))
        for each in anatomy.layers
    ]
    return replace(anatomy, layers=tuple(layers))


def test_loads_and_saturation():
    tokens = np.arange(1, 200)
    assert expected_unique(1, 60, 4) == pytest.approx(4)  # N(1) = K
    assert (np.diff(expected_unique(tokens, 60, 4)) > 0).all()
    assert mean_load(1, 8, 2) == 1
    assert mean_load(500, 8, 2) == pytest.approx(125)  # rho t, once all are touched
    assert saturation_tokens(8, 2) == pytest.approx(math.log(0.05) / math.log(0.75))
    assert expected_unique(saturation_tokens(64, 4), 64, 4) == pytest.approx(0.95 * 64)
    assert saturation_tokens(4, 4) == 1
    with pytest.raises(wb.UserError, match="cannot be given 9 of 8 experts"):
        saturation_tokens(8, 9)


def test_verifying_is_free_where_no_more_weights_are_read(moe):
    assert target_efficiency(anatomy_of(random_llama()), 7, context=100) == 1
    assert target_efficiency(with_top_k(moe, 6), 7) == 1  # every token has all experts


def test_target_efficiency_falls_with_gamma_and_comes_back_with_the_batch(moe):
    sparse = with_top_k(moe, 1, 64)
    values = [target_efficiency(sparse, gamma) for gamma in range(1, 8)]
    assert values == sorted(values, reverse=True) and values[0] < 1
    batches = [target_efficiency(sparse, 3, batch=batch) for batch in (16, 64, 256, 1024)]
    assert batches == sorted(batches) and batches[-1] == pytest.approx(1, abs=1e-6)
    with pytest.raises(wb.UserError, match="0 drafted tokens"):
        target_efficiency(sparse, 0)


def test_bytes_of_a_step_by_hand(moe):
    # a layer: q and o 32 x 32, k and v 32 x 16, gate 32 x 6, N experts of 3 x 32 x 48, 20 tokens of K and V of 2 heads of 8
    experts = 6 * (1 - (2 / 3) ** 4)
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 32 * 6 + experts * 3 * 32 * 48 + 2 * 20 * 2 * 2 * 8
    assert step_bytes(moe, 2, batch=2, context=20) == pytest.approx(4 * (3 * layer + 96 * 32))


def test_a_sheet_takes_the_slower_of_flops_and_bytes(moe):
    sparse = with_top_k(moe, 1, 64)
    bound_by_memory = target_efficiency(sparse, 3, context=64, hardware="h100-sxm")
    assert bound_by_memory == pytest.approx(target_efficiency(sparse, 3, context=64), rel=0.1)
    # where everything is bound by FLOPs, four tokens take four times as long as one
    assert target_efficiency(sparse, 3, batch=100_000, hardware="h100-sxm") == pytest.approx(1 / 4, rel=0.2)


def test_a_planned_step_costs_what_a_recorded_one_does():
    model = random_gemma()  # which has layers that slide over 16 tokens and others that do not
    cache = DynamicCache(config=model.config)
    with wb.profile(model) as prof, torch.no_grad():
        model(ids(30, 2), past_key_values=cache)
        model(ids(4, 2), past_key_values=cache)
    recorded = wb.predict(prof.trace.select(steps=[1]), "a100-40").predicted_s
    assert step_seconds(prof.trace.anatomy, 4, "a100-40", batch=2, context=30) == pytest.approx(recorded)


def test_the_speed_up_from_its_parts_is_tokens_over_time():
    parts = speed_up(4, 3.5, target_s=0.020, verify_s=0.026, draft_s=0.002, reject_s=0.001)
    assert parts.sigma == 0.7 and parts.target_efficiency == pytest.approx(20 / 26)
    # 3.5 tokens in 4 x 2 + 26 + 1 ms, against one in 20 ms
    assert parts.total == pytest.approx(3.5 / 0.035 * 0.020)
    with pytest.raises(wb.UserError, match="cannot make 6 tokens"):
        speed_up(4, 6, 1, 1)


def test_seen_experts_stand_beside_those_expected():
    model = random_model("mixtral")
    with wb.profile(model) as prof, torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids(8), past_key_values=cache)
        for length in (1, 3, 3):
            model(ids(length, seed=length), past_key_values=cache)
    table = seen_beside_expected(prof.trace).set_index(["layer", "tokens"])
    hit = prof.trace.table("routing").query("tokens > 0").groupby(["step", "layer"]).size()
    for layer in range(3):
        assert table.loc[(layer, 3), "steps"] == 2
        assert table.loc[(layer, 3), "measured_unique"] == (hit[2, layer] + hit[3, layer]) / 2
        assert table.loc[(layer, 1), "measured_unique"] == 2
        assert table.loc[(layer, 1), "predicted_unique"] == pytest.approx(2)
        assert table.loc[(layer, 8), "predicted_unique"] == pytest.approx(6 * (1 - (2 / 3) ** 8))
    assert set(seen_beside_expected(prof.trace, phase="append")["tokens"]) == {3}


def test_tokens_that_choose_alike_hit_fewer_than_expected():
    model = random_model("mixtral")
    for gate in router_modules(model).values():
        gate.weight.data.zero_()
    with wb.profile(model) as prof, torch.no_grad():
        model(ids(16))
    table = seen_beside_expected(prof.trace)
    assert (table["measured_unique"] == 2).all() and (table["measured_load"] == 16).all() and (table["ratio"] < 0.4).all()
