"""STUN: what its tables count, which experts become one, what merged routers and experts compute, and how many zeros."""

from __future__ import annotations

import itertools

import pytest
import torch

import workbench as wb
from workbench.engine.banks import banks_of
from workbench.engine.calibration import Document
from workbench.engine.experts import RouteState
from workbench.engine.gate import Gate
from workbench.engine.neurons import neurons
from workbench.engine.routed import routed
from workbench.models.anatomy import expert_modules, router_modules
from workbench.testing import ids, random_model

TEXT = ids(40)[0].tolist()


@pytest.fixture(scope="module", params=["mixtral", "gpt_oss"])
def lm(request, tiny) -> wb.LM:
    lm = wb.load((random_model(request.param), tiny.tokenizer))
    wb.calibrate(lm, "stun", documents=[Document(tuple(TEXT), len(TEXT))])
    return lm


def ready(lm: wb.LM, **knobs) -> wb.STUN:
    return wb.Session(lm, wb.STUN(**knobs)).setup.routing


def test_tables_count_pairs_and_add_up_inputs(lm):
    tables = ready(lm).tables
    for number, (layer, state) in enumerate(routed(lm, TEXT)[0].items()):
        together = torch.zeros(6, 6, dtype=torch.int32)
        for one, other in state.experts.tolist():  # these models choose two
            together[one, other] += 1
            together[other, one] += 1
        assert torch.equal(tables["together"][number], together)
        layout = neurons(expert_modules(lm.model)[layer])
        for expert in range(6):
            hidden = state.hidden[(state.experts == expert).any(-1)]
            torch.testing.assert_close(tables["outer"][number, expert], hidden.square().sum(0))
            torch.testing.assert_close(tables["inner"][number, expert], layout.inner(expert, hidden).square().sum(0))


def test_experts_that_fire_together_are_merged_first(lm):
    method = ready(lm, kept=17 / 18)
    together = method.tables["together"].float()
    scaled = together / together.mean((1, 2), keepdim=True)
    layer, one, other = (scaled == scaled.max()).nonzero()[0].tolist()
    assert [len(each.clusters) for each in method.merged] == [6 - (number == layer) for number in range(3)]
    assert sorted((one, other)) in method.merged[layer].clusters


def test_a_representative_is_the_member_nearest_to_the_centroid_of_weights(lm):
    method = ready(lm, kept=0.5)
    for merged, module in zip(method.merged, expert_modules(lm.model).values(), strict=True):
        flat = torch.cat([weight.flatten(1) for weight in module.parameters()], -1)
        assert not merged.averaged or len(merged.clusters) <= 2
        for members, representative in zip(merged.clusters, merged.representatives, strict=True):
            away = (flat[members] - flat[members].mean(0)).norm(dim=-1)
            assert merged.averaged or away[members.index(representative)] <= away.min() + 1e-5


@torch.no_grad()
@pytest.mark.parametrize("averaged", [0, 6])
def test_a_merged_layer_is_a_smaller_layer_of_its_own(lm, averaged):
    """The same from weights: a router with a row a cluster, and experts that are members or means, computed plainly."""
    method = ready(lm, kept=0.5, sparsity=0.0, averaged=averaged)
    states, _ = routed(lm, TEXT)
    for number, (layer, state) in enumerate(states.items()):
        merged, module, router = method.merged[number], expert_modules(lm.model)[layer], router_modules(lm.model)[layer]
        if len(merged.clusters) == 6:
            continue
        groups = merged.clusters if averaged else [[each] for each in merged.representatives]
        rows = torch.stack([router.weight[members].mean(0) for members in groups])
        bias = 0 if getattr(router, "bias", None) is None else torch.stack([router.bias[members].mean() for members in groups])
        logits = state.hidden @ rows.T + bias
        count = min(2, len(groups))
        odds, chosen = logits.topk(count, dim=-1)
        given = method.route(state)
        numbers = torch.tensor([*merged.representatives])
        assert torch.equal(given.experts[:, :count], numbers[chosen]) and (given.experts[:, count:] == 6).all()
        torch.testing.assert_close(given.weights[:, :count], odds.softmax(-1))  # both families give weights that sum to one
        bank = banks_of(method, lm)[layer]
        assert [size > 0 for size in bank.weight_bytes] == [expert in merged.representatives for expert in range(6)]
        for members, expert in zip(groups, merged.representatives, strict=True):
            means = {name: weight[members].mean(0) for name, weight in module.named_parameters(recurse=False)}
            for name, weight in bank.parts[expert].named_parameters(recurse=False):
                torch.testing.assert_close(weight[0] if weight.ndim > 1 and len(weight) == 1 else weight, means[name])
        with pytest.raises(LookupError, match="is gone"):
            bank.compute(next(expert for expert in range(6) if expert not in merged.representatives), state.hidden)


def test_merging_identical_experts_changes_nothing_where_weights_sum_to_one(tiny):
    lm = wb.load((random_model("mixtral"), tiny.tokenizer))
    with torch.no_grad():
        for module in expert_modules(lm.model).values():
            for weight in module.parameters():
                weight.copy_(weight[:1].expand_as(weight))
    wb.calibrate(lm, "stun", documents=[Document(tuple(TEXT), len(TEXT))])
    dense = wb.Session(lm).prefill(TEXT)
    for kept, averaged in itertools.product((0.0, 0.4, 0.9), (0, 6)):
        given = wb.Session(lm, wb.STUN(kept=kept, sparsity=0.0, averaged=averaged)).prefill(TEXT)
        torch.testing.assert_close(given, dense, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kept, sparsity", [(1.0, 0.3), (0.8, 0.5), (0.5, 0.5), (0.5, 0.9), (0.4, 0.1)])
def test_weights_gone_and_zero_are_the_share_asked_for(lm, kept, sparsity):
    method = ready(lm, kept=kept, sparsity=sparsity)
    size, count = 3 * 32 * 48, 3 * 6
    left = sum(len(each.clusters) for each in method.merged)
    assert left == round(kept * count) and method.resident_bytes(lm) == 4 * size * left
    share = (method.zeros(lm) + (count - left) * size) / (count * size)
    assert share == pytest.approx(max(sparsity, 1 - left / count), abs=0.5 / 32)  # rows of 32 and of 48 weights


def test_zeros_are_the_weights_of_an_output_that_matter_least(lm):
    method = ready(lm, kept=1.0, sparsity=0.25)
    layer, module = next(iter(expert_modules(lm.model).items()))
    part = banks_of(method, lm)[layer].parts[1]
    turned = neurons(module).axes["down_proj"] == 1  # GPT-OSS stores inputs before outputs
    for name, inputs in (("gate_up_proj", "outer"), ("down_proj", "inner")):
        weight, sparse = (each.T if turned else each for each in (getattr(module, name)[1], getattr(part, name)[0]))
        effect = weight.abs() * method.tables[inputs][0, 1].sqrt()
        for before, after, row in zip(weight, sparse, effect, strict=True):
            gone = row.argsort(stable=True)[: len(row) // 4]
            assert (after == 0).nonzero().flatten().tolist() == gone.sort().values.tolist()
            assert torch.equal(after[after != 0], before[after != 0])


def test_a_bias_and_groups_of_the_gate_go_with_the_experts_that_are_left(lm):
    """As DeepSeek-V3's: sigmoid scores, a bias for the choice alone, the best of two groups of three."""
    method, logits = ready(lm, kept=0.7, averaged=0), torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    number, merged = next((number, each) for number, each in enumerate(method.merged) if 2 < len(each.clusters) < 6)
    gate = Gate("sigmoid", True, 2.5, torch.linspace(-0.3, 0.4, 6), (2, 1))
    chosen = gate.ranking(logits).topk(2).indices
    positions = torch.arange(20, dtype=torch.int32)[None]
    state = RouteState(
        torch.zeros(20, 32), logits, chosen, gate.weights(logits, chosen), gate, positions, "prefill", 0, number, 3
    )
    given, left = method.route(state), set(merged.representatives)
    for token, (experts, weights) in enumerate(zip(given.experts.tolist(), given.weights, strict=True)):
        rank = {expert: logits[token, expert].sigmoid().item() + gate.bias[expert].item() for expert in left}
        groups = [sorted((rank.get(expert, 0.0) for expert in range(3 * g, 3 * g + 3)), reverse=True)[:2] for g in (0, 1)]
        group = max((0, 1), key=lambda g: sum(groups[g]))
        there = sorted((expert for expert in left if expert // 3 == group), key=rank.get, reverse=True)[:2]
        assert experts == there + [6] * (2 - len(there))
        odds = logits[token, there].sigmoid()
        torch.testing.assert_close(weights[: len(there)], 2.5 * odds / odds.sum())
