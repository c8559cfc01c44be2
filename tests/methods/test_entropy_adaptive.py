"""Entropy adaptive decoding: who writes follows from entropies, and what catching up costs is counted."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

import workbench as wb
from workbench.methods.decoding.entropy_adaptive import cost, entropy, used_parameters
from workbench.testing import random_model

PROMPT = "The statement is executed and then the list of targets is evaluated. " * 2


@pytest.fixture(scope="module")
def moe() -> wb.LM:
    return wb.load("tiny-moe")


def run(lm, count=40, **knobs):
    session = wb.Session(lm, wb.EntropyAdaptive(**knobs))
    session.prefill(PROMPT)
    return session.generate(count, stop_at_end=False), session


def writers(session) -> list[str]:
    """Who wrote each new token, by the phase of the step it was taken from."""
    tokens = session.trace.table("tokens")
    partner = set(session.trace.table("work").query("layer == -1")["step"])
    return ["small" if step in partner else "large" for step in tokens["step"][tokens["step"] > 0]]


def alone(lm, count=40):
    session = wb.Session(lm)
    session.prefill(PROMPT)
    return session.generate(count, stop_at_end=False)


def test_above_every_entropy_only_the_small_model_writes(moe, tiny):
    out, session = run(moe, tau=math.inf)
    assert out == alone(tiny) and session.trace.meta["decoding"]["by_other"] == 40
    assert session.trace.meta["decoding"]["figures"]["large_share"] == 0 and set(writers(session)) == {"small"}


def test_below_every_entropy_only_the_large_one_does_after_the_least(moe):
    out, session = run(moe, tau=-math.inf, least=10)
    assert writers(session) == ["small"] * 10 + ["large"] * 30
    led = wb.Session(moe)
    led.prefill([*session.tokens[0][:-40], *out.ids[0][:10]])
    assert led.generate(30, stop_at_end=False).ids[0] == out.ids[0][10:]


@pytest.mark.parametrize(("least", "window", "tau"), [(5, 3, 2.0), (3, 1, 3.0), (7, 5, 2.5)])
def test_each_writes_the_least_number_of_tokens_before_the_other_does(moe, least, window, tau):
    _, session = run(moe, 60, tau=tau, least=least, window=window)
    said = writers(session)
    runs = [1]
    for before, now in itertools.pairwise(said):
        runs = [*runs[:-1], runs[-1] + 1] if now == before else [*runs, 1]
    assert len(runs) > 2 and min(runs[:-1]) >= least and len(runs) == 1 + session.trace.meta["decoding"]["switches"]


def test_with_a_window_and_least_of_one_the_last_entropy_decides(moe):
    _, session = run(moe, 50, tau=2.5, least=1, window=1)
    said = writers(session)
    bits = (session.trace.table("tokens").tail(50)["entropy"] / math.log(2)).tolist()
    assert said == ["small", *("large" if each >= 2.5 else "small" for each in bits[:-1])] and len(set(said)) == 2


def test_entropy_is_in_bits_and_between_none_and_that_of_a_fair_choice():
    assert entropy(torch.zeros(64)) == pytest.approx(6)
    assert entropy(torch.tensor([1000.0, 0, 0])) == 0
    assert 0 <= entropy(torch.randn(1536)) <= math.log2(1536)


def test_a_token_is_what_the_writer_expects_after_the_whole_text(moe, tiny):
    out, session = run(moe, 40, tau=2.5, least=3)
    said = writers(session)
    assert set(said) == {"small", "large"}
    text = session.tokens[0][:-40]
    for token, who in zip(out.ids[0], said, strict=True):
        model = (tiny if who == "small" else moe).model
        with torch.no_grad():
            assert int(model(torch.tensor([text])).logits[0, -1].argmax()) == token
        text = [*text, token]


def test_catching_up_is_in_the_trace_and_counted(moe, tiny):
    _, session = run(moe, 40, tau=-math.inf, least=10)
    counts, steps = session.trace.meta["decoding"], session.trace.table("steps")
    prompt = len(session.tokens[0]) - 40
    assert (
        counts["caught_up_small"] == prompt
        and counts["caught_up_large"] == 10
        and counts["figures"]["caught_up"] == prompt + 10
    )
    assert steps.query("phase == 'catch-up'")["tokens"].tolist() == [prompt, 10]
    small = wb.Session(tiny)
    small.prefill(session.tokens[0][:prompt])
    small.generate(9, stop_at_end=False)
    by = session.trace.flops(by="slot").set_index("slot")["flops"]
    assert by["decoding"] == small.trace.flops()
    moved = session.trace.bytes(by="slot").set_index("slot")["bytes"]
    assert moved["decoding"] == small.trace.bytes()


def test_what_it_costs_weighs_parameters_by_who_wrote(moe, tiny):
    assert cost(0.25, 10, 40) == pytest.approx((10 + 30 * 0.25) / 40)
    experts = moe.anatomy.layers[0].experts
    unused = 6 * sum(linear.in_features * linear.out_features for linear in experts.linears)
    assert used_parameters(moe.anatomy) == moe.anatomy.num_parameters - 4 * unused
    assert used_parameters(tiny.anatomy) == tiny.anatomy.num_parameters
    figures = run(moe, 20, tau=-math.inf, least=5)[1].trace.meta["decoding"]["figures"]
    assert figures["large_share"] == 0.75
    assert figures["cost"] == pytest.approx(cost(0.75, tiny.anatomy.num_parameters, moe.anatomy.num_parameters))


def test_the_text_goes_on_whoever_wrote_it(moe):
    """Further turns, branches and swaps: the session's own model reads what it has not."""
    _, session = run(moe, 12, tau=math.inf)
    fork, plain = session.branch(), session.branch()
    session.append("\nRecall: apple")
    again = session.generate(5, stop_at_end=False)
    fork.append("\nRecall: apple")
    assert fork.generate(5, stop_at_end=False) == again and fork.tokens == session.tokens
    plain.swap(None)
    plain.append("\nRecall: apple")
    led = wb.Session(moe)
    led.prefill(plain.tokens[0])
    torch.testing.assert_close(plain.logits, led.logits, atol=1e-4, rtol=1e-3)


def test_led_along_a_text_each_token_has_the_logits_of_whose_turn_it_was(moe, tiny):
    workload = wb.workloads.text(context=64, samples=1, continuation=12)
    cmp = wb.compare(moe, workload, [wb.EntropyAdaptive(tau=math.inf), wb.EntropyAdaptive(tau=-math.inf, least=1)])
    _, small, large = cmp.rows
    assert small.nll == pytest.approx(wb.compare(tiny, workload, []).rows[0].nll, abs=1e-4)
    assert small.decoded == (12, 12) and large.decoded == (1, 12) and large.kl_to_dense < small.kl_to_dense
    assert small.kv_physical_bytes > cmp.rows[0].kv_physical_bytes and small.ffn_resident_bytes > cmp.rows[0].ffn_resident_bytes


def test_models_of_other_tokens_are_refused(tiny):
    lm = wb.load((random_model("llama"), tiny.tokenizer))
    with pytest.raises(wb.UserError, match="their tokens differ; name a small model"):
        wb.Session(lm, wb.EntropyAdaptive())
    with pytest.raises(wb.UserError, match="There is no model 'no-such'"):
        wb.Session(tiny, wb.EntropyAdaptive(small="no-such"))
