"""Informed routing: what is forecast is not computed, forecasts are worth something, and shares are kept to."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import workbench as wb
from workbench.engine import router_training as training
from workbench.engine.calibration import Document, ready
from workbench.engine.fitting import inputs_and_outputs
from workbench.engine.forecast import errors
from workbench.engine.replacing import logits_under
from workbench.experiments.calibrate import prose_documents
from workbench.models.anatomy import attention_modules, mlp_modules
from workbench.testing import ids, random_model


@pytest.fixture(scope="module")
def tokens(tiny):
    return prose_documents(tiny, 1, context=100, seed=11)[0].tokens


def informed(lm, **knobs) -> wb.InformedRouting:
    return ready(wb.InformedRouting(**knobs), lm)


def test_nothing_approximated_is_the_model_bit_for_bit(tiny, tokens):
    dense, session = wb.Session(tiny), wb.Session(tiny, wb.InformedRouting(sparsity=0))
    assert torch.equal(session.prefill(tokens), dense.prefill(tokens))
    assert session.generate(4, stop_at_end=False) == dense.generate(4, stop_at_end=False)
    assert session.trace.table("work").empty and session.trace.flops() == dense.trace.flops()


@pytest.mark.parametrize("sparsity", [0.1, 0.25, 0.5, 0.9])
def test_an_oracle_approximates_the_share_asked_for(tiny, tokens, sparsity):
    session = wb.Session(tiny, informed(tiny, sparsity=sparsity, mode="oracle"))
    session.prefill(tokens)
    work = session.trace.table("work").query("component in ['mlp', 'attention.out']")
    assert len(work) == 8 and (abs(work["changed"] / 100 - sparsity) <= 1 / 100).all()


def test_an_oracle_forecasts_the_tokens_it_forecasts_best(tiny, tokens):
    method = informed(tiny, sparsity=0.3, mode="oracle")
    session = wb.Session(tiny, method, routing="choices")
    taken = []
    hook = mlp_modules(tiny.model)[0].register_forward_hook(lambda _, args, out: taken.append((args[0][0], out[0])))
    session.prefill(tokens)
    hook.remove()
    hidden, out = taken[0]
    forecaster = method.forecaster(tiny, "mlp.0")
    true = type(mlp_modules(tiny.model)[0]).forward(mlp_modules(tiny.model)[0], hidden)
    best = set(errors(forecaster(hidden), true).argsort(stable=True)[:30].tolist())
    choices = session.trace.table("choices").query("layer == 0")
    assert {row.position for row in choices.itertuples() if row.experts[0] == 1} == best
    expected = torch.stack([forecaster(hidden)[at] if at in best else true[at] for at in range(100)])
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-4)


def test_forecasts_are_better_than_nothing_and_routers_than_chance(tiny, tokens):
    method = informed(tiny)
    modules = {f"attention.{layer}": module for layer, module in enumerate(attention_modules(tiny.model))}
    modules |= {f"mlp.{layer}": module for layer, module in mlp_modules(tiny.model).items()}
    for name, (hidden, out) in zip(modules, inputs_and_outputs(tiny, list(modules.values()), tokens), strict=True):
        forecast = errors(method.forecaster(tiny, name)(hidden), out)
        assert forecast.mean() < errors(torch.zeros_like(out), out).mean(), name
    dense = logits_under(tiny, None, tokens).log_softmax(-1)

    def distance(setup):
        return float((dense.exp() * (dense - logits_under(tiny, setup, tokens).log_softmax(-1))).sum(-1).mean())

    shares = [distance(informed(tiny, sparsity=share)) for share in (0.1, 0.25, 0.5)]
    assert shares == sorted(shares) and shares[1] < 0.5
    assert distance(_Random(informed(tiny))) > 2 * shares[1]


class _Random(wb.InformedRouting):
    """As many tokens and modules at random."""

    def __init__(self, known):
        super().__init__()
        object.__setattr__(self, "calibration", known.calibration)

    def _chooses(self, lm, call, module):
        chosen = torch.Generator().manual_seed(0)
        return lambda hidden: torch.rand(len(hidden), generator=chosen) < self.sparsity


def test_about_the_share_asked_for_is_approximated_on_other_text(tiny, tokens):
    for sparsity in (0.25, 0.5):
        session = wb.Session(tiny, informed(tiny, sparsity=sparsity))
        session.prefill(tokens)
        work = session.trace.table("work").query("component in ['mlp', 'attention.out']")
        assert work["changed"].sum() / 800 == pytest.approx(sparsity, abs=0.1)


def counted(lm, setup, prompt):
    session, counter = wb.Session(lm, setup), FlopCounterMode(display=False)
    with counter:
        session.prefill(prompt)
        for token in (3, 4, 5):
            session.step([token])
    return counter.get_total_flops(), session.trace


def test_flops_fall_by_what_is_left_out_less_forecasters_and_routers(tiny, tokens):
    wb.Session(tiny)
    dense, before = counted(tiny, None, tokens)
    fewer, trace = counted(tiny, informed(tiny, sparsity=0.5), tokens)
    assert before.flops() - trace.flops() == dense - fewer > 0
    by = trace.flops(by=["slot", "component"]).set_index(["slot", "component"])["flops"]
    assert by["routing", "method"] == 103 * 8 * (2 * 128 * 32 + 2 * 32 * 2)
    work = trace.table("work")
    left = work.groupby("component")["changed"].sum()
    own, forecast = 6 * 128 * 352, 4 * 128 * 32
    mlp = trace.flops(by="component").set_index("component")["flops"]["mlp"]
    assert mlp == (103 * 4 - left["mlp"]) * own + left["mlp"] * forecast
    out = trace.flops(by="component").set_index("component")["flops"]["attention.out"]
    assert out == (103 * 4 - left["attention.out"]) * 2 * 128 * 128 + left["attention.out"] * forecast
    kv = 2 * 2 * 128 * lm_kv(tiny)
    qkv = trace.flops(by="component").set_index("component")["flops"]["attention.qkv"]
    assert qkv == (103 * 4 - left["attention.out"]) * 2 * 128 * 128 + 103 * 4 * kv


def lm_kv(lm) -> int:
    attention = lm.anatomy.layers[0].attention
    return attention.num_kv_heads * attention.head_dim


def test_k_and_v_are_those_of_every_token(tiny, tokens):
    """In the first layer, whose input no approximation has reached."""
    dense, session = wb.Session(tiny), wb.Session(tiny, informed(tiny, sparsity=0.9))
    dense.prefill(tokens)
    session.prefill(tokens)
    assert torch.equal(session._cache.layers[0].keys, dense._cache.layers[0].keys)
    assert not torch.allclose(session._cache.layers[2].keys, dense._cache.layers[2].keys)


def test_it_is_calibrated_for_any_family_in_small(tiny, monkeypatch):
    for name in ("FORECAST_STEPS", "WARM_STEPS", "ROUTER_STEPS"):
        monkeypatch.setattr(training, name, 3)
    lm = wb.load((random_model("gpt2"), tiny.tokenizer))
    before = {name: weight.clone() for name, weight in lm.model.state_dict().items()}
    told = []
    documents = [Document(tuple(ids(30, seed=seed)[0].tolist()), 30) for seed in (1, 2)]
    found = wb.calibrate(lm, wb.InformedRouting(), documents=documents, on_progress=lambda *each: told.append(each[1:]))
    assert told == [(done, 6 * 6 + 3) for done in range(1, 40)]
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.state_dict().items())
    assert not any(module.__dict__.get("forward") for module in lm.model.modules())
    method = wb.InformedRouting(sparsity=0.5).with_calibration(found)
    assert method.forecaster(lm, "mlp.0").first.shape == (8, 32), "a quarter of the hidden size"
    session = wb.Session(lm, method)
    session.prefill(ids(20))
    assert "attention.qkv" not in set(session.trace.table("work")["component"]), "one matrix for q, k and v"
    assert session.trace.table("work").query("component == 'mlp'")["changed"].sum() > 0
