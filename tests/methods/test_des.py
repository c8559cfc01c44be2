"""Dynamic Expert Sharing: what a coreset holds, and that all tokens stay inside it with as many experts as before."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import workbench as wb
from workbench.engine.routed import routed
from workbench.methods.routing.coreset import favourites, route_inside
from workbench.methods.routing.des_vote import elected
from workbench.testing import ids, random_model


@pytest.fixture(scope="module")
def moe() -> wb.LM:
    return wb.load("tiny-moe")


@pytest.fixture(scope="module")
def blocks(moe):
    """States of every layer for blocks of 16 tokens, as a block decoder has them."""
    text = moe.tokenizer("The statement is executed repeatedly until the iterator is exhausted, or a break ends the loop. " * 4)
    tokens = text.input_ids
    return [state for start in (0, 16, 32) for state in routed(moe, tokens[start : start + 16])[0].values()]


def prefilled(lm, method, prompt, **options) -> wb.Session:
    session = wb.Session(lm, method, **options)
    session.prefill(prompt)
    return session


def hit(session) -> list[int]:
    """Most experts hit in a layer, step by step."""
    routing = session.trace.table("routing").query("tokens > 0")
    return routing.groupby(["step", "layer"])["expert"].count().groupby("step").max().tolist()


def test_the_vote_elects_as_many_experts_as_it_says_and_tokens_stay_inside(blocks):
    for state in blocks:
        for size in (1, 2, 5, 8):
            core = elected(state, size)
            assert core.sum() == min(size, 8)
            given = route_inside(state, core)
            inside = given.experts < 8
            assert core[given.experts[inside]].all() and (inside.sum(-1) == min(size, 2)).all()
            assert (given.experts[inside].view(16, -1).sort(-1).values.diff(dim=-1) > 0).all()


def test_gates_sum_to_what_the_model_normalises_to(blocks):
    for state in blocks:
        for core in (elected(state, 3), favourites(state, 1).any(0)):
            torch.testing.assert_close(route_inside(state, core).weights.sum(-1), state.weights.sum(-1))


def test_a_whole_coreset_gives_back_the_models_choice(blocks):
    for state in blocks:
        for core in (elected(state, 8), favourites(state, 2).any(0)):
            given = route_inside(state, core)
            assert torch.equal(given.experts.sort(-1).values, state.experts.sort(-1).values)
            torch.testing.assert_close(given.weights.sort(-1).values, state.weights.sort(-1).values)


def test_votes_recall_more_of_the_models_choice_than_first_choices_do(blocks):
    """At coresets of equal size, on average."""
    recalls = []
    for state in blocks:
        first = favourites(state, 1).any(0)
        recalls.append([core[state.experts].float().mean().item() for core in (first, elected(state, int(first.sum())))])
    by_first, by_vote = torch.tensor(recalls).mean(0).tolist()
    assert by_first < by_vote < 1


def test_the_vote_by_hand(blocks):
    """Three tokens; the third's weaker vote outweighs a second choice, and ties go to the lower number."""
    probs = torch.tensor([[0.6, 0.3, 0.1, 0], [0.6, 0.3, 0.1, 0], [0, 0, 0.3, 0.7]])
    logits = probs.clamp(min=1e-9).log()
    experts = torch.tensor([[0, 1], [0, 1], [3, 2]])
    known = {"logits": logits, "experts": experts, "weights": probs.gather(1, experts), "positions": torch.arange(3)[None]}
    state = dataclasses.replace(blocks[0], **known)
    # votes: 1.2, 0.6, 0.3 (token 3's alone: 0.1 of the others is outside their top 2), 0.7
    assert [elected(state, size).nonzero().flatten().tolist() for size in (1, 2, 3)] == [[0], [0, 3], [0, 1, 3]]
    alone = dataclasses.replace(state, positions=torch.tensor([[-1, -1, 0]]))
    assert elected(alone, 3).nonzero().flatten().tolist() == [0, 2, 3]
    assert favourites(alone, 1).any(0).tolist() == [False, False, False, True]


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_a_session_reads_no_expert_outside_the_coreset(family, tiny):
    lm = wb.load((random_model(family), tiny.tokenizer))
    prompts = [ids(12)[0].tolist(), ids(7, seed=1)[0].tolist()]
    voted = prefilled(lm, wb.DesVote(beta=0.5), prompts)
    voted.generate(3, stop_at_end=False)
    assert max(hit(voted)) <= 3 and len(hit(voted)) == 4
    table = voted.trace.table("work")
    assert table.query("component == 'experts' and changed > 0")["layer"].nunique() >= 2
    assert table.query("component == 'method'")["bytes"].gt(0).all()
    first = prefilled(lm, wb.DesSeq(k=1), prompts[0])
    first.step()
    assert hit(first)[-1] == 1  # a token alone


def test_a_token_whose_groups_have_nothing_in_the_core_goes_to_others(tiny):
    """DeepSeek-V3's gate chooses groups first: here one of two, of three experts each."""
    lm = wb.load((random_model("deepseek_v3"), tiny.tokenizer))
    state = routed(lm, ids(16)[0].tolist())[0][1]
    core = torch.tensor([False] * 3 + [True] * 3)
    given = route_inside(state, core)
    at_home = (state.experts >= 3).all(-1)
    assert at_home.any() and not at_home.all() and core[given.experts].all()
    same = given.experts.sort(-1).values == state.experts.sort(-1).values
    assert torch.equal(same.all(-1), at_home)
    torch.testing.assert_close(given.weights.sum(-1), state.weights.sum(-1))


@pytest.mark.parametrize("method", [wb.DesSeq(k=2), wb.DesVote(beta=1.0)], ids=lambda method: method.label)
def test_settings_that_leave_nothing_out_change_nothing(moe, method):
    text = "The statement is executed repeatedly. " * 8
    dense, shared = prefilled(moe, None, text), prefilled(moe, method, text)
    for _ in range(3):
        assert torch.equal(dense.step(), shared.step())
    assert not shared.trace.table("work")["changed"].any()


def test_padding_has_no_vote(moe):
    """A row beside a longer one reads the experts that it reads alone with as many tokens of text."""
    short, long = moe.tokenizer("The statement is").input_ids, list(range(40, 72))
    session = wb.Session(moe, wb.DesSeq(k=1), routing="choices")
    session.prefill([short, long])
    chosen = session.trace.table("choices")
    assert set(chosen[chosen["row"] == 0]["position"]) == set(range(len(short)))
    states, _ = routed(moe, long)
    firsts = {int(each) for each in states[0].experts[:, 0]}
    own, _ = routed(moe, short)
    firsts |= {int(each) for each in own[0].experts[:, 0]}
    layer = session.trace.table("routing").query("step == 0 and layer == 0 and tokens > 0")
    assert set(layer["expert"]) <= firsts
