"""Methods that rehearse: what they keep is what later tokens look at."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import workbench as wb
from workbench.engine.policy import LayerState
from workbench.methods.cache.base import pseudo_tokens
from workbench.testing import ids, random_llama, random_model

PROMPT = 40


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(attn_implementation="eager"), tiny.tokenizer))


def seen_states(lm, method, prompt) -> list[LayerState]:
    """The state each layer's decision was made on."""
    states = []

    @dataclasses.dataclass(frozen=True)
    class Watching(type(method)):
        def keep(self, state):
            states.append(state)
            return super().keep(state)

    knobs = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    wb.Session(lm, Watching(**knobs)).prefill(prompt)
    return states


def greedy(lm, prompt, count) -> list[int]:
    session = wb.Session(lm)
    session.prefill(prompt)
    return list(session.generate(count, stop_at_end=False).ids[0])


def eager_attention(lm, prompt, tokens):
    """Each layer's attention `[Hq, len(tokens), P]` of tokens after a prompt over the prompt."""
    with torch.no_grad():
        out = lm.model(torch.tensor([[*prompt, *tokens]]), output_attentions=True)
    return [layer[0, :, len(prompt) :, : len(prompt)] for layer in out.attentions]


def kept(session):
    return [[set(head.tolist()) for head in layer.store.positions[0]] for layer in session._cache.layers]


def test_pseudo_tokens_are_the_ends_of_the_prompt():
    assert pseudo_tokens([list(range(100))], 32, 4) == ((0, 1, 2, 3, *range(72, 100)),)
    assert pseudo_tokens([[7, 8, 9]], 5, 2) == ((7, 8, 7, 8, 9),)
    assert pseudo_tokens([[7, 8, 9]], 8, 2) == ((7, 8, 7, 8, 9, 7, 8, 9),)
    assert pseudo_tokens([[7, 8, 9]], 2, 4) == ((7, 8),)


@pytest.mark.parametrize("source", ["pseudo", "continuation"])
def test_dapq_scores_are_the_eager_attention_of_the_tokens_after_the_prompt(lm, source):
    prompt = ids(PROMPT)[0].tolist()
    tokens = [*prompt[:4], *prompt[-4:]] if source == "pseudo" else greedy(lm, prompt, 8)
    states = seen_states(lm, wb.DapQ(budget=10, tokens=8, source=source), prompt)
    for state, expected in zip(states, eager_attention(lm, prompt, tokens), strict=True):
        torch.testing.assert_close(state.foresight[0], expected.sum(1), atol=1e-5, rtol=1e-5)


def test_the_oracle_keeps_what_the_dense_continuation_looks_at(lm):
    prompt = ids(PROMPT)[0].tolist()
    attention = eager_attention(lm, prompt, greedy(lm, prompt, 6))
    session = wb.Session(lm, wb.Oracle(budget=10, horizon=6))
    session.prefill(prompt)
    for layer, rows in zip(kept(session), attention, strict=True):
        best = rows.sum(1).unflatten(0, (2, 2)).sum(1).topk(10).indices
        assert layer == [set(head.tolist()) for head in best]


def test_the_true_continuation_as_pseudo_tokens_recalls_the_oracle_set(lm):
    prompt = ids(PROMPT)[0].tolist()
    sessions = [
        wb.Session(lm, wb.DapQ(budget=10, tokens=6, source="continuation")),
        wb.Session(lm, wb.Oracle(budget=10, horizon=6)),
        wb.Session(lm, wb.DapQ(budget=10, tokens=6)),
    ]
    for session in sessions:
        session.prefill(prompt)
    assert kept(sessions[0]) == kept(sessions[1]) != kept(sessions[2])


def test_one_true_token_gives_tovas_score(lm):
    """TOVA's row at the step that decodes the first token, over the prompt: the same row in every layer and head."""
    prompt = ids(PROMPT)[0].tolist()
    states = seen_states(lm, wb.DapQ(budget=10, tokens=1, source="continuation"), prompt)
    first = greedy(lm, prompt, 1)
    for state, expected in zip(states, eager_attention(lm, prompt, first), strict=True):
        torch.testing.assert_close(state.foresight[0].mean(0), expected[:, 0].mean(0), atol=1e-5, rtol=1e-5)


def test_positions_matter_to_a_model_that_rotates_and_to_no_other(tiny):
    prompt = ids(PROMPT)[0].tolist()
    for rotates, family in ((True, [1, 1, 1]), (False, [0, 0, 0])):
        model = wb.load((random_model("smollm3", no_rope_layers=family), tiny.tokenizer))
        answer, before = (
            seen_states(model, wb.DapQ(budget=10, tokens=8, positions=where), prompt) for where in ("answer", "prompt")
        )
        for a, b in zip(answer, before, strict=True):
            assert torch.equal(a.foresight, b.foresight) is not rotates


def test_decoding_goes_on_at_the_end_of_the_prompt(lm):
    session = wb.Session(lm, wb.DapQ(budget=10, tokens=8))
    session.prefill(ids(PROMPT))
    session.step()
    assert all((layer.store.positions[..., -1] == PROMPT).all() for layer in session._cache.layers)


def test_dapq_knobs_keep_the_recent_and_lift_neighbours():
    foresight = torch.zeros(1, 2, 20)
    foresight[0, :, 7] = 1.0
    empty = torch.zeros(1, 1, 20, 2)
    positions = torch.arange(20).view(1, 1, 20)
    state = LayerState(empty, empty, positions, torch.tensor([6]), 1.0, 0, 1, "rehearsal", foresight=foresight)
    held = wb.DapQ(budget=6, keep_recent=3).keep(state)[0, 0].nonzero().flatten().tolist()
    assert held == [0, 1, 7, 17, 18, 19]
    held = wb.DapQ(budget=5, pooling="max", kernel=5).keep(dataclasses.replace(state, capacity=torch.tensor([5])))
    assert held[0, 0].nonzero().flatten().tolist() == [5, 6, 7, 8, 9]
    assert wb.DapQ(budget=6, keep_recent=100).keep(state)[0, 0].nonzero().flatten().tolist() == list(range(14, 20))


def test_a_replay_serves_the_continuation_and_what_was_rehearsed(lm):
    recording = wb.record(lm, ids(PROMPT), new_tokens=6)
    point = wb.replay(recording, [wb.Oracle(horizon=6)], [0.3]).points[0]
    torch.testing.assert_close(*(torch.tensor(mass.mean()) for mass in (point.mass_retained, point.oracle_mass)))
    same = wb.replay(recording, ["dapq:source=continuation,tokens=6"], [0.3]).points[0]
    assert (same.gone == point.gone).all()
    with pytest.raises(wb.UserError, match="looks 32 tokens ahead and the recording has 6; record with new_tokens=32"):
        wb.replay(recording, ["oracle"])
    for text in ("dapq", "lookahead-kv", "lookahead-kv:mode=pseudo", "dapq:source=continuation,positions=prompt,tokens=6"):
        with pytest.raises(wb.UserError, match="rehearses tokens of its own, which this recording does not hold"):
            wb.replay(recording, [text])
