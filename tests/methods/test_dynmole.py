"""DynMoLE: the entropy and its limit, who gets how many experts, and what becomes of their weights."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import workbench as wb
from workbench.engine.experts import RouteState
from workbench.engine.gate import Gate
from workbench.methods.routing.dynmole import nucleus, tsallis_entropy
from workbench.testing import ids, random_model


def state(odds: torch.Tensor, renormalises: bool = False) -> RouteState:
    """Tokens whose router's softmax gives these probabilities, and whose model takes the best two."""
    logits = odds.clamp(min=1e-30).log()
    gate = Gate("softmax", renormalises, 1.0)
    experts = logits.topk(2).indices
    positions = torch.arange(len(odds), dtype=torch.int32)[None]
    return RouteState(
        torch.zeros(len(odds), 4), logits, experts, gate.weights(logits, experts), gate, positions, "prefill", 0, 0, 1
    )


def given(odds: list[float], **knobs) -> list[int]:
    routed = wb.DynMoLE(**knobs).route(state(torch.tensor([odds])))
    return routed.experts[0][routed.experts[0] < len(odds)].tolist()


def test_the_entropy_of_equal_odds_is_the_largest_and_of_one_hot_zero():
    for q, count in ((0.5, 4), (1.0, 8), (1.1, 8), (2.0, 6)):
        equal = torch.full((1, count), 1 / count)
        most = math.log(count) if q == 1 else (1 - count ** (1 - q)) / (q - 1)
        assert tsallis_entropy(equal, q).item() == pytest.approx(most, rel=1e-5)
        assert tsallis_entropy(torch.eye(count)[:1], q).item() == 0
    assert tsallis_entropy(torch.full((1, 8), 1 / 8), 1.1).item() == pytest.approx(1.877, abs=1e-3)


def test_the_entropy_approaches_shannons():
    odds = torch.rand(5, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64).softmax(-1)
    shannon = tsallis_entropy(odds, 1.0)
    assert torch.equal(shannon, tsallis_entropy(odds, 1 + 1e-7))
    gaps = [(tsallis_entropy(odds, 1 + step) - shannon).abs().max().item() for step in (0.1, 0.01, 1e-3, 1e-5)]
    assert gaps == sorted(gaps, reverse=True) and gaps[-1] < 1e-4


def test_a_sure_token_gets_the_fewest_experts_and_an_unsure_one_all():
    sure, unsure = [1.0, *[0.0] * 7], [1 / 8] * 8
    for keep in (1, 2, 5):
        assert given(sure, keep_top_k=keep) == list(range(keep))
        assert sorted(given(unsure, keep_top_k=keep)) == list(range(8))
    assert len(given(unsure, threshold=1.9)) == 6  # 6/8 of the probability is top_p, and that is above any entropy of 8


def test_the_expert_that_crosses_top_p_is_left_out():
    odds = [0.4, 0.3, 0.2, 0.1]
    never = {"threshold": math.inf, "keep_top_k": 1}
    assert given(odds, top_p=0.69, **never) == [0] and given(odds, top_p=0.71, **never) == [0, 1]
    assert given(odds, top_p=0.0, **never) == [0] and given(odds, top_p=1.0, **never)[:3] == [0, 1, 2]
    assert given(odds, top_p=0.0, threshold=math.inf, keep_top_k=3) == [0, 1, 2]
    assert nucleus(torch.tensor([[0.5, 0.25, 0.25]]), 0.75, 1).tolist() == [[True, True, False]]


def test_weights_are_the_odds_or_sum_to_one_as_the_models_gate_has_it():
    odds = torch.tensor([[0.4, 0.3, 0.2, 0.1]])
    method = wb.DynMoLE(threshold=math.inf, keep_top_k=1, top_p=0.75)
    assert method.route(state(odds)).weights.tolist() == [pytest.approx([0.4, 0.3, 0, 0])]
    assert method.route(state(odds, renormalises=True)).weights.tolist() == [pytest.approx([4 / 7, 3 / 7, 0, 0])]


def test_experts_a_token_stand_in_the_table_of_routing(tiny):
    """Every entropy asked for in the table of choices, token by token, from the logits recorded there."""
    lm = wb.load((random_model("mixtral"), tiny.tokenizer))
    with torch.no_grad():
        for layer in lm.model.model.layers:
            layer.mlp.gate.weight.mul_(20)  # so that some tokens are sure and some are not
    method = wb.DynMoLE(threshold=1.4, keep_top_k=1, top_p=0.8)
    session = wb.Session(lm, method, routing="logits")
    session.prefill(ids(30)[0].tolist())
    session.generate(3, stop_at_end=False)
    counts = []
    for row in session.trace.table("choices").itertuples():
        odds = torch.tensor(row.logits).softmax(-1)
        place = odds.argsort(descending=True)
        unsure = tsallis_entropy(odds[None], 1.1).item() > 1.4
        expected = 6 if unsure else max(1, int((odds[place].cumsum(-1) <= 0.8).sum()))
        experts = [expert for expert in row.experts if expert >= 0]
        assert experts == place[:expected].tolist()
        counts.append(expected)
    assert session.trace.table("routing")["tokens"].sum() == sum(counts) and {1, 6} < set(counts)


def test_more_experts_than_there_are_is_one_sentence(tiny):
    lm = wb.load((random_model("mixtral"), tiny.tokenizer))
    with pytest.raises(wb.UserError, match="keep_top_k=7 experts a token are more than the 6 that layer 0 has"):
        wb.Session(lm, wb.DynMoLE(keep_top_k=7))
    same = wb.DynMoLE.identity(lm.anatomy)
    assert same == wb.DynMoLE(threshold=math.inf, top_p=0.0, keep_top_k=2)
    other = dataclasses.replace(lm.anatomy.layers[1], experts=dataclasses.replace(lm.anatomy.layers[1].experts, top_k=1))
    assert wb.DynMoLE.identity(dataclasses.replace(lm.anatomy, layers=(lm.anatomy.layers[0], other))) is None
