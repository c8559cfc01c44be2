"""Duo-LLM: patterns of big and small FFNs, and what oracles over them would give."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
import torch.nn.functional as F

import workbench as wb
from workbench.engine.calibration import Document, ready
from workbench.engine.ffn import ffns
from workbench.engine.fitting import inputs_and_outputs
from workbench.experiments import patterns as analysis
from workbench.experiments.calibrate import prose_documents, recall_documents
from workbench.methods.routing import duo_llm
from workbench.models.anatomy import mlp_modules
from workbench.testing import ids, random_model


@pytest.fixture(scope="module")
def duo(tiny) -> wb.DuoLLM:
    """With the small FFNs that come with tiny-dense."""
    return ready(wb.DuoLLM(), tiny)


@pytest.fixture(scope="module")
def texts(tiny):
    return [*prose_documents(tiny, 1, context=96, seed=5), *recall_documents(tiny, 1, context=96, seed=5)]


@pytest.fixture(scope="module")
def losses(tiny, duo, texts):
    return analysis.pattern_losses(tiny, duo, texts)


def test_all_big_is_the_model_bit_for_bit(tiny):
    dense = wb.Session(tiny)
    expected = dense.prefill(ids(40)), dense.generate(4, stop_at_end=False)
    for method in (wb.DuoLLM(pattern="bbbb"), wb.DuoLLM(big=4), wb.DuoLLM.identity(tiny.anatomy)):
        session = wb.Session(tiny, method)
        assert torch.equal(session.prefill(ids(40)), expected[0]) and session.generate(4, stop_at_end=False) == expected[1]
        assert session.trace.table("work").empty and method.with_calibration(duo_of(tiny)).resident_bytes(tiny) == held(tiny)


def duo_of(lm):
    return ready(wb.DuoLLM(), lm).calibration


def held(lm):
    return sum(ffn.weight_bytes for ffn in ffns(lm).values())


def test_a_pattern_says_what_each_layer_runs(tiny, duo):
    pattern = "b-sb"
    session = wb.Session(tiny, duo.with_pattern(pattern))
    taken = {}
    hooks = [
        module.register_forward_hook(lambda _, args, out, layer=layer: taken.update({layer: (args[0], out)}))
        for layer, module in mlp_modules(tiny.model).items()
    ]
    session.prefill(ids(12))
    for hook in hooks:
        hook.remove()
    branches = duo.branches(tiny)
    for layer, letter in enumerate(pattern):
        hidden, out = taken[layer]
        small, none = branches[layer]
        compute = {"b": ffns(tiny)[layer], "s": small, "-": none}[letter]
        torch.testing.assert_close(out, compute(hidden), atol=1e-6, rtol=1e-5)
    assert [branches[layer][0].neurons for layer in range(4)] == [352 // 16] * 4
    big, small = ffns(tiny)[0].weight_bytes, branches[0][0].weight_bytes
    assert session.setup.routing.resident_bytes(tiny) == 2 * big + small


def test_the_small_ffn_is_fitted_and_starts_at_the_neurons_that_contribute_most(tiny, duo, texts):
    modules = list(mlp_modules(tiny.model).values())
    seen = inputs_and_outputs(tiny, modules, texts[0].tokens)
    for (hidden, out), (layer, big) in zip(seen, ffns(tiny).items(), strict=True):
        start, fitted = duo_llm.smaller(big, hidden, 22), duo.branches(tiny)[layer][0]
        assert F.mse_loss(fitted(hidden), out) < F.mse_loss(start(hidden), out)
        assert F.mse_loss(fitted(hidden), out) < out.square().mean()
        whole = duo_llm.smaller(big, hidden, 352)
        torch.testing.assert_close(whole(hidden), out, atol=1e-5, rtol=1e-4)


def test_there_are_as_many_patterns_as_there_are_ways_to_choose():
    for layers, big in itertools.product((1, 4, 6), (0, 1, 3)):
        found = duo_llm.patterns(layers, big)
        assert len(set(found)) == len(found) == math.comb(layers, big)
    assert len(duo_llm.patterns(6)) == 2**6


def test_the_oracle_is_never_worse_than_a_fixed_pattern_nor_that_than_the_mean(losses):
    table = analysis.summary(losses)
    assert table["big"].tolist() == [0, 1, 2, 3, 4] and table["patterns"].tolist() == [1, 4, 6, 4, 1]
    assert (table["oracle"] <= table["fixed"]).all() and (table["fixed"] <= table["mean"] + 1e-12).all()
    assert (table["oracle"].iloc[1:4] < table["fixed"].iloc[1:4]).all()


def test_more_patterns_never_make_the_oracle_worse(losses):
    best = [analysis.oracle(losses.iloc[:count]) for count in range(1, 17)]
    assert best == sorted(best, reverse=True)
    assert analysis.oracle(losses) <= analysis.best_of_random(losses, 100) <= analysis.best_of_random(losses, 1) + 1e-9


def test_a_token_is_difficult_as_far_as_compute_helps_it(losses):
    gap = analysis.difficulty(losses)
    assert (gap >= 0).all() and gap.max() > 1 and len(gap) == losses.shape[1]
    assert gap.equals((losses.loc["ssss"] - losses.min(axis=0)).rename("gap"))


def test_losses_are_those_of_a_session_led_along_the_text(tiny, duo, texts, losses):
    session = wb.Session(tiny, duo.with_pattern("sbsb"))
    tokens = texts[0].tokens
    session.prefill(tokens[:90])
    for place in range(90, 94):
        expected = -session.logits[0].log_softmax(-1)[tokens[place]]
        assert losses.loc["sbsb", (0, place)] == pytest.approx(expected.item(), abs=1e-4)
        session.step([tokens[place]])


def test_the_best_pattern_found_at_calibration_is_the_fixed_one(tiny, monkeypatch):
    monkeypatch.setattr(duo_llm, "STEPS", 3)
    lm = wb.load((random_model("gpt2"), tiny.tokenizer))
    documents = [Document(tuple(ids(30, seed=seed)[0].tolist()), 30) for seed in (1, 2)]
    found = wb.calibrate(lm, wb.DuoLLM(ratio=4), documents=documents)
    method = wb.DuoLLM(ratio=4).with_calibration(found)
    losses = analysis.pattern_losses(lm, method, documents)
    for big in range(4):
        pattern = wb.DuoLLM(ratio=4, big=big).with_calibration(found).chosen(lm)
        assert pattern.count("b") == big
        assert losses.loc[pattern].mean() == pytest.approx(analysis.fixed(losses, big), abs=1e-6)
    monkeypatch.setattr(duo_llm, "MOST_PATTERNS", 1)
    greedy = wb.calibrate(lm, wb.DuoLLM(ratio=4), documents=documents).tables["best"]
    assert greedy.sum(1).tolist() == [0, 1, 2, 3] and (greedy[1:] >= greedy[:-1]).all()


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"pattern": "bxb"}, "write b .big., s .small. or - .none."),
        ({"pattern": "bb-"}, "of 3 layers, and tiny-dense has 4"),
        ({"big": 5}, "big=5 is more than the 4 layers"),
    ],
)
def test_a_pattern_that_does_not_fit_is_one_sentence(tiny, knobs, message):
    with pytest.raises(wb.UserError, match=message) as caught:
        wb.Session(tiny, wb.DuoLLM(**knobs))
    assert "\n" not in str(caught.value)


def test_a_mixture_of_experts_is_refused():
    with pytest.raises(wb.UserError, match="'duo-llm' acts on dense FFNs"):
        wb.Session(wb.load("tiny-moe"), wb.DuoLLM(pattern="bbbb"))
