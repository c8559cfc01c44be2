"""Workloads: exact lengths, the same episodes for the same seed, answers that are really in the context."""

from __future__ import annotations

import pytest

import workbench as wb
from workbench.texts import prose
from workbench.workloads import Answer, parse_workload
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


def test_recall_at_one_depth(tiny):
    for depth in (0.0, 0.5, 1.0):
        (episode,) = wb.workloads.recall(context=400, samples=1, depth=depth, facts=5).episodes(tiny)
        text = tiny.tokenizer.decode(episode.context)
        before, after = text.partition("Remember:")[0], text.rpartition("Remember:")[2]
        assert len(episode.turns) == 5 and {turn.depth for turn in episode.turns} == {round(100 * depth)}
        assert len(before) / (len(before) + len(after)) == pytest.approx(depth, abs=0.05)


def test_recall_spread_says_where_each_fact_stands(tiny):
    (episode,) = wb.workloads.recall(context=600, samples=1).episodes(tiny)
    text = tiny.tokenizer.decode(episode.context)
    assert sorted(turn.depth for turn in episode.turns) == [12, 38, 62, 88]
    for turn in episode.turns:
        key = tiny.tokenizer.decode(turn.prompt).split()[-1]
        place = 100 * text.index(f"Remember: {key}") / len(text)
        assert abs(place - turn.depth) < 20


def test_a_needle_stands_at_every_depth(tiny):
    workload = wb.workloads.needle(context=300, samples=2, depths=3)
    episodes = workload.episodes(tiny)
    assert episodes == workload.episodes(tiny) and len(episodes) == 6
    for episode in episodes:
        (turn,) = episode.turns
        question, answer = (tiny.tokenizer.decode(part) for part in (turn.prompt, turn.answer))
        text = tiny.tokenizer.decode(episode.context)
        assert text.count(question + answer) == 1 and 280 <= len(episode.context) <= 300
        assert 100 * text.index(question) / (len(text) - len(question + answer)) == pytest.approx(turn.depth, abs=3)
        assert len(answer.strip()) == 5 and answer.strip().isdigit()
        assert workload.score(tiny, Answer(turn, turn.answer, ())) == 1
        assert workload.score(tiny, Answer(turn, turn.answer[:-1], ())) == 0
    assert [turn.depth for episode in episodes for turn in episode.turns] == [0, 0, 50, 50, 100, 100]
    assert len({episode.turns[0].answer for episode in episodes}) == 2


def test_copy_asks_for_what_follows_in_the_context(tiny):
    workload = wb.workloads.copy(context=200, samples=3, cue=8, passage=10)
    for episode in workload.episodes(tiny):
        (turn,) = episode.turns
        whole = turn.prompt + turn.answer
        starts = [start for start in range(200) if episode.context[start : start + 8] == turn.prompt]
        assert len(episode.context) == 200 and len(turn.answer) == 10 and len(starts) == 1
        assert episode.context[starts[0] : starts[0] + 18] == whole and 20 <= starts[0] <= 40
        wrong = turn.answer[3] + 1
        assert workload.score(tiny, Answer(turn, turn.answer, ())) == 1
        assert workload.score(tiny, Answer(turn, (*turn.answer[:3], wrong, *turn.answer[4:]), ())) == 0.3


@pytest.mark.parametrize("name", [name for name in wb.workloads.WORKLOADS if name != "text"])
def test_the_question_may_stand_in_the_prompt_of_every_workload_that_asks(tiny, name):
    settings = {"context": 128, "samples": 2}
    later = wb.workloads.WORKLOADS[name](**settings).episodes(tiny)
    sooner = wb.workloads.WORKLOADS[name](query_aware=True, **settings).episodes(tiny)
    asked = [(episode.context + turn.prompt, turn.answer, turn.depth) for episode in later for turn in episode.turns]
    assert [(each.context, each.turns[0].answer, each.turns[0].depth) for each in sooner] == asked
    assert all(len(each.turns) == 1 and each.turns[0].prompt == () for each in sooner)


def test_workloads_in_text_form():
    assert parse_workload("recall:facts=5,query_aware=true", context=64) == wb.workloads.recall(
        context=64, facts=5, query_aware=True
    )
    assert parse_workload("copy:depth=0.5").depth == 0.5 and parse_workload("text") == wb.workloads.text()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("chess", "no workload named 'chess'"),
        ("recall:colour=1", "no setting 'colour'; its settings are context"),
        ("recall:facts", "needs a value"),
        ("recall:depth=2", "depth=2; give a share of the context from 0 to 1"),
        ("needle:depths=0", "depths=0; give a whole number from 1"),
        ("copy:cue=0", "cue=0"),
        ("copy:passage=600", "not within a context of 512"),
        ("text:context=many", "context='many'"),
    ],
)
def test_wrong_workloads_are_one_sentence(text, message):
    with pytest.raises(wb.UserError, match=message):
        parse_workload(text)


@pytest.mark.parametrize("length", [1, 50, 8000, 150_000])
def test_prose_of_any_length(tiny, length):
    assert len(prompt_tokens(tiny, length)) == length


def test_held_out_prose_comes_first():
    held_out = " ".join(prose.held_out_topics())
    assert 0.03 < len(prose.held_out_topics()) / len(prose.topics()) < 0.25
    assert set(" ".join(prose.words()[:2000]).split()) <= set(held_out.split())


def test_registry():
    assert set(wb.workloads.WORKLOADS) >= {"copy", "needle", "recall", "text"}
    assert all(cls.summary() for cls in wb.workloads.WORKLOADS.values())
    with pytest.raises(AttributeError, match="no workload 'chess'"):
        wb.workloads.chess()
