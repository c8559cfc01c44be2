"""Workloads: exact lengths, the same episodes for the same seed, answers that are really in the context."""

from __future__ import annotations

import pytest

import workbench as wb
from workbench.texts import prose
from workbench.workloads import Answer
from workbench.workloads.plain_text import prompt_tokens


@pytest.mark.parametrize("context", [96, 333, 1024])
def test_recall_contexts(tiny, context):
    workload = wb.workloads.recall(context=context, samples=3)
    episodes = workload.episodes(tiny)
    assert episodes == workload.episodes(tiny)
    assert len({episode.context for episode in episodes}) == 3
    for episode in episodes:
        assert context - 16 <= len(episode.context) <= context
        text = tiny.tokenizer.decode(episode.context)
        for turn in episode.turns:
            key = tiny.tokenizer.decode(turn.prompt).split()[-1]
            assert f"Remember: {key}{tiny.tokenizer.decode(turn.answer)}." in text


def test_query_aware_puts_the_question_into_the_prompt(tiny):
    plain = wb.workloads.recall(context=128, samples=1, facts=2).episodes(tiny)[0]
    aware = wb.workloads.recall(context=128, samples=1, facts=2, query_aware=True).episodes(tiny)
    assert [episode.context for episode in aware] == [plain.context + turn.prompt for turn in plain.turns]
    assert all(episode.turns[0].prompt == () for episode in aware)


def test_recall_scores_whole_answers(tiny):
    workload = wb.workloads.recall(context=128, samples=1)
    turn = workload.episodes(tiny)[0].turns[0]
    assert workload.score(tiny, Answer(turn, turn.answer, ())) == 1
    assert workload.score(tiny, Answer(turn, turn.answer[:-1], ())) == 0
    assert workload.score(tiny, Answer(turn, (), ())) == 0


def test_text_is_exact(tiny):
    episodes = wb.workloads.text(context=100, samples=2, continuation=10).episodes(tiny)
    assert all(len(episode.context) == 100 and len(episode.turns[0].answer) == 10 for episode in episodes)
    turn = episodes[0].turns[0]
    half = (*turn.answer[:5], *[0] * 5)
    assert wb.workloads.text().score(tiny, Answer(turn, (), half)) == 0.5


@pytest.mark.parametrize("length", [1, 50, 8000, 150_000])
def test_prose_of_any_length(tiny, length):
    assert len(prompt_tokens(tiny, length)) == length


def test_held_out_prose_comes_first():
    held_out = " ".join(prose.held_out_topics())
    assert 0.03 < len(prose.held_out_topics()) / len(prose.topics()) < 0.25
    assert set(" ".join(prose.words()[:2000]).split()) <= set(held_out.split())


def test_registry():
    assert set(wb.workloads.WORKLOADS) >= {"recall", "text"}
    assert all(cls.summary() for cls in wb.workloads.WORKLOADS.values())
    with pytest.raises(AttributeError, match="no workload 'chess'"):
        wb.workloads.chess()
