"""Sirius: drafts are sparse, what the whole model accepts is its own again, and what it refuses is gone."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import workbench as wb
from workbench.engine.ffn import ffns
from workbench.testing import ids, random_model

PROMPT = "The statement is executed and then the list of targets is evaluated. " * 3
WAYS = ["fine", "coarse"]


def generated(lm, setup, count=32, prompt=PROMPT):
    session = wb.Session(lm, setup)
    session.prefill(prompt)
    return session.generate(count, stop_at_end=False), session


@pytest.fixture(scope="module")
def dense(tiny):
    return generated(tiny, None)


@pytest.mark.parametrize("way", WAYS)
def test_without_a_threshold_all_is_accepted(tiny, way):
    out, session = generated(tiny, wb.Sirius(sparsity=way, threshold=0.0, kernel_size=8))
    figures = session.trace.meta["decoding"]
    assert figures["figures"]["aal"] == 8 and figures["passes"] == 4 and len(out.ids[0]) == 32
    assert figures["tokens"] == 32 and figures["by_other"] == 28


@pytest.mark.parametrize("way", WAYS)
def test_above_one_nothing_is_and_the_text_is_the_whole_models(tiny, dense, way):
    out, session = generated(tiny, wb.Sirius(sparsity=way, threshold=1.5, kernel_size=4), 12)
    assert out.ids[0] == dense[0].ids[0][:12] and session.trace.meta["decoding"]["figures"]["aal"] == 1


@pytest.mark.parametrize("way", WAYS)
def test_with_all_neurons_it_decodes_as_the_model_does(tiny, dense, way):
    out, session = generated(tiny, wb.Sirius(sparsity=way, keep=1.0))
    assert out == dense[0] and session.tokens == dense[1].tokens
    torch.testing.assert_close(session.logits, dense[1].logits, atol=1e-4, rtol=1e-4)
    assert session.trace.table("work").empty


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("threshold", [0.0, 0.1, 0.5])
def test_after_a_correction_all_kv_is_the_whole_models(tiny, way, threshold):
    out, session = generated(tiny, wb.Sirius(sparsity=way, threshold=threshold, kernel_size=6))
    whole = wb.Session(tiny)
    whole.prefill(session.tokens[0])
    assert len(session.tokens[0]) == len(whole.tokens[0])
    for mine, theirs in zip(session._cache.layers, whole._cache.layers, strict=True):
        torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(mine.store.values, theirs.store.values, atol=1e-4, rtol=1e-4)
        assert torch.equal(mine.store.positions, theirs.store.positions) and mine.get_seq_length() == len(whole.tokens[0])
    torch.testing.assert_close(session.logits, whole.logits, atol=1e-4, rtol=1e-3)
    figures = session.trace.meta["decoding"]
    assert 1 <= figures["figures"]["aal"] <= 6 and figures["tokens"] == 32 == len(out.ids[0])


def test_sliding_windows_get_back_what_a_draft_pushed_out(tiny):
    lm = wb.load((random_model("gemma3_text"), tiny.tokenizer))
    prompt = ids(14)[0].tolist()
    dense, _ = generated(lm, None, 24, prompt)
    out, session = generated(lm, wb.Sirius(threshold=1.5, kernel_size=5), 24, prompt)
    assert out.ids == dense.ids
    positions = session._cache.layers[0].store.positions[0, 0]
    assert positions[-15:].tolist() == list(range(23, 38)), "the window of the last query and before"


def test_a_rounds_arithmetic_on_any_family(tiny):
    lm = wb.load((random_model("gpt2"), tiny.tokenizer))
    prompt = ids(9)[0].tolist()
    dense, _ = generated(lm, None, 12, prompt)
    for way in WAYS:
        assert generated(lm, wb.Sirius(sparsity=way, threshold=1.1, kernel_size=3), 12, prompt)[0].ids == dense.ids


def test_published_densities_follow_from_the_shape_of_llama_3():
    """0.76 and 0.65 in the paper's table for Llama-3-8B at half the neurons; 15.37 and 15.22 accepted make 0.807 and 0.706."""
    ffn, all_parameters = 32 * 3 * 4096 * 14336, 8_030_261_248
    fine, coarse = 1 - ffn * (2 / 3) * 0.5 / all_parameters, 1 - ffn * 0.5 / all_parameters
    assert math.isclose(fine, 0.76, abs_tol=0.01) and math.isclose(coarse, 0.65, abs_tol=0.01)
    assert math.isclose((15 * 0.76 + 1) / 15.37, 0.807, abs_tol=1e-3)
    assert math.isclose((15 * 0.65 + 1) / 15.22, 0.706, abs_tol=1e-3)


def test_density_is_of_the_whole_model(tiny):
    weights = sum(ffn.weight_bytes for ffn in ffns(tiny).values()) // 4
    assert wb.Sirius(keep=1.0).density(tiny) == 1
    assert wb.Sirius(sparsity="coarse").density(tiny) == pytest.approx(1 - weights / 2 / tiny.anatomy.num_parameters)
    assert wb.Sirius().density(tiny) == pytest.approx(1 - weights / 3 / tiny.anatomy.num_parameters)
    assert wb.Sirius().resident_bytes(tiny) == 0 and wb.Sirius(sparsity="coarse").resident_bytes(tiny) == 4 * weights // 2


def test_a_draft_keeps_the_neurons_of_largest_activation(tiny):
    session = wb.Session(tiny, wb.Sirius(keep=0.25))
    session.prefill(PROMPT)
    module, ffn = tiny.model.model.layers[0].mlp, ffns(tiny)[0]
    taken = []
    hook = module.register_forward_hook(lambda _, args, out: taken.append((args[0][0], out[0])))
    session.attempt([5], "draft")
    hook.remove()
    hidden, out = taken[0]
    activated = ffn.activated(hidden)
    floor = activated.abs().topk(88).values[..., -1:]
    inner = torch.where(activated.abs() >= floor, activated, 0) * torch.nn.functional.linear(hidden, *ffn.up)
    torch.testing.assert_close(out, torch.nn.functional.linear(inner, *ffn.down), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("way", "share"), [("fine", 2 / 3), ("coarse", 1 / 2)])
def test_drafts_compute_what_is_counted(tiny, way, share):
    session = wb.Session(tiny, wb.Sirius(sparsity=way))
    session.prefill(PROMPT)
    counted = []
    for phase in ("draft", "verify"):
        counter = FlopCounterMode(display=False)
        with counter:
            session.attempt([5], phase)
        session.take_back(1)
        counted.append(counter.get_total_flops())
    steps = session.trace.flops(by="step").set_index("step")["flops"]
    assert steps[2] - steps[1] == counted[1] - counted[0] > 0
    by = session.trace.flops(by=["phase", "slot", "component"]).set_index(["phase", "slot", "component"])["flops"]
    assert by["draft", "decoding", "mlp"] == round(share * 4 * 6 * 128 * 352)
    assert by["verify", "model", "mlp"] == 4 * 6 * 128 * 352


def test_the_trace_holds_each_token_once_with_the_whole_models_word_on_it(tiny):
    out, session = generated(tiny, wb.Sirius(threshold=0.05, kernel_size=5))
    tokens = session.trace.table("tokens")
    assert tokens["position"].tolist() == list(range(len(session.tokens[0])))
    assert tokens["id"].tolist() == session.tokens[0] and tokens["logprob"].tail(32).notna().all()
    led = wb.Session(tiny)
    led.prefill(session.tokens[0][:-32])
    expected = []
    for token in out.ids[0]:
        expected.append(float(led.logits[0].log_softmax(-1)[token]))
        led.step([token])
    assert tokens["logprob"].tail(32).tolist() == pytest.approx(expected, abs=1e-3)
    steps = session.trace.table("steps")
    assert set(steps["phase"]) == {"prefill", "draft", "verify"} and not session.trace.notes


def test_it_stops_at_the_end_of_the_text_and_says_every_token(tiny, monkeypatch):
    told = []
    free, _ = generated(tiny, wb.Sirius(threshold=0.0))
    monkeypatch.setattr(type(tiny), "end_tokens", property(lambda _: frozenset({free.ids[0][6]})))
    session = wb.Session(tiny, wb.Sirius(threshold=0.0))
    session.prefill(PROMPT)
    out = session.generate(32, on_token=told.append)
    first = free.ids[0].index(free.ids[0][6])
    assert out.ids[0] == free.ids[0][: first + 1] and [token for (token,) in told] == list(out.ids[0])


def test_coarse_neurons_are_chosen_by_the_prompt_and_a_branch_keeps_the_choice(tiny):
    session = wb.Session(tiny, wb.Sirius(sparsity="coarse"))
    session.prefill(PROMPT)
    fork = session.branch()
    assert fork.generate(12) == session.generate(12)
    late = wb.Session(tiny)
    late.prefill(PROMPT)
    late.swap(wb.Sirius(sparsity="coarse"))
    with pytest.raises(wb.UserError, match="chooses neurons while the prompt is read"):
        late.generate(4)


@pytest.mark.parametrize(
    ("setup", "message"),
    [
        ([wb.Sirius(), wb.H2O(budget=0.5)], "'sirius' takes tokens back.*does not go with 'h2o'"),
        ([wb.Sirius(), wb.DuoLLM(pattern="-bbb")], "'duo-llm' and 'sirius' both replace what an FFN"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(tiny, setup, message):
    with pytest.raises(wb.UserError, match=message) as caught:
        wb.Session(tiny, setup)
    assert "\n" not in str(caught.value)
    assert wb.Session(tiny, [wb.Sirius(), wb.Dense()]).setup.decoding == wb.Sirius()


def test_batches_experts_and_live_runs_are_refused(tiny):
    session = wb.Session(tiny, wb.Sirius())
    session.prefill([PROMPT, PROMPT])
    with pytest.raises(wb.UserError, match="one text at a time, and this session has 2"):
        session.generate(4)
    with pytest.raises(wb.UserError, match="no dense FFN"):
        wb.Session(wb.load("tiny-moe"), wb.Sirius())
    from workbench.live import LiveRun

    with pytest.raises(wb.UserError, match="'sirius' finds tokens in its own way"):
        LiveRun(tiny, wb.Sirius())
    run = LiveRun(tiny)
    with pytest.raises(wb.UserError, match="leave it out here"):
        run.swap(wb.Sirius())


def test_it_is_compared_by_the_logits_its_tokens_would_be_taken_from(tiny):
    workload = wb.workloads.text(context=64, samples=1, continuation=12)
    cmp = wb.compare(tiny, workload, [wb.Sirius(threshold=1.5), wb.Sirius(threshold=0.0, keep=0.1), wb.Sirius(keep=1.0)])
    dense, strict, loose, whole = cmp.rows
    assert strict.kl_to_dense < 1e-5 and whole.kl_to_dense < 1e-5 < 0.1 < loose.kl_to_dense
    assert strict.nll == pytest.approx(dense.nll, abs=1e-4) and strict.decoded == (0, 12) and whole.decoded[1] == 12
    assert "decoding 11/12 tokens" in loose.fired and dense.decoded is None
    assert dict(loose.decoding)["aal"] == 12 and cmp.decoding.shape == (3, 3)
    assert strict.ffn_read_bytes > dense.ffn_read_bytes and strict.tpot_s > 0
