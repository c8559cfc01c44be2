"""A check runs points of a replay live, and says how far the replay foretold them."""

from __future__ import annotations

import dataclasses

import pytest

import workbench as wb
from workbench.testing import ids, random_llama, random_model
from workbench.trace.check import Check, CheckedPoint
from workbench.workloads.plain_text import prompt_tokens

METHODS = ["snapkv:window=8", "h2o", "streaming-llm", "random:seed=3"]


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(), tiny.tokenizer))


@pytest.fixture(scope="module")
def recording(lm) -> wb.Recording:
    return wb.record(lm, ids(40), new_tokens=8)


@pytest.fixture(scope="module")
def replay(recording) -> wb.Replay:
    return wb.replay(recording, METHODS, [0.2, 5, 0.9, 1.0])


def test_live_runs_hold_what_was_foretold_where_a_replay_promises_it(lm, recording, replay):
    """A method that decides once sees the dense run's tensors, so its kept sets are exact; one that goes on deciding drifts."""
    check = wb.check_replay(lm, recording, replay, points=len(replay.points))
    assert sorted(point.setup for point in check.points) == sorted(point.setup for point in replay.points)
    for point in check.points:
        if point.method.startswith(("snapkv", "random", "streaming")):
            assert point.kept_equal == point.kept_overlap == 1
        assert 0.5 < point.kept_overlap <= 1 and 0 <= point.live_top1 <= 1 and point.live_kl >= 0
    assert check.rank_correlation > 0.5


def test_a_method_that_decides_at_every_step_drifts_and_the_check_sees_it(tiny):
    recording = wb.record(tiny, prompt_tokens(tiny, 200), new_tokens=16)
    replay = wb.replay(recording, ["tova", "snapkv"], [0.1])
    drifting, exact = sorted(wb.check_replay(tiny, recording, replay).points, key=lambda point: point.method == "snapkv")
    assert drifting.kept_overlap < 1 and drifting.kept_equal < 1 and exact.kept_equal == 1
    assert drifting.live_kl > 0 and exact.live_kl > 0


def test_what_is_read_is_checked_where_methods_select_merge_or_close_ranks(tiny):
    recording = wb.record(tiny, prompt_tokens(tiny, 200), new_tokens=8)
    replay = wb.replay(recording, ["quest", "quest:share_heads=false", "mpcache", "ems", "streaming-llm:positions=slot"], [0.3])
    check = wb.check_replay(tiny, recording, replay)
    by_method = {point.method: point for point in check.points}
    assert by_method["ems"].kept_equal == by_method["streaming-llm(positions=slot)"].kept_equal == 1
    for name in ("quest", "quest(share_heads=False)", "mpcache"):
        assert 0.7 < by_method[name].kept_overlap <= 1 and by_method[name].live_kl > 0
    # Two layers are dense and the first that selects sees what it saw in the dense run, so at least three of four agree.
    assert by_method["quest"].kept_equal >= 0.75


def test_the_points_are_spread_over_the_predicted_error(lm, recording, replay):
    errors = sorted(float(point.output_error.mean()) for point in replay.points)
    done = []
    check = wb.check_replay(lm, recording, replay, points=3, on_progress=lambda *each: done.append(each))
    found = [point.predicted_error for point in check.points]
    assert len(found) == 3 and found[0] == errors[0] and found[-1] == errors[-1] and found == sorted(found)
    assert done == [("live runs", number, 3) for number in (1, 2, 3)]


def test_a_full_budget_is_dense_live_too(lm, recording):
    check = wb.check_replay(lm, recording, wb.replay(recording, ["snapkv"], [1000]))
    (point,) = check.points
    assert point.live_kl == 0 and point.live_top1 == 1 and point.kept_equal == 1


def test_rank_correlation_by_hand():
    first = CheckedPoint("m", 1, "m(budget=1)", 0.1, 0.0, 1.0, 0.75, 0.5)

    def points(*kl):
        made = (dataclasses.replace(first, predicted_error=0.1 * n, live_kl=each) for n, each in enumerate(kl))
        return Check({}, tuple(made))

    assert points(1, 2, 9).rank_correlation == pytest.approx(1)
    assert points(3, 2, 1).rank_correlation == pytest.approx(-1)
    # Ranks 1 2 3 4 against 2 1 4 3: 1 - 6 * 4 / (4 * 15)
    assert points(5, 1, 9, 7).rank_correlation == pytest.approx(0.6)
    assert points(1, 2).rank_correlation is None and points(1, 1, 1).rank_correlation is None
    assert "rank correlation +0.60" in str(points(5, 1, 9, 7)) and "75.0%" in str(points(5, 1, 9, 7))
    assert "too few different points" in str(points(1, 1, 1))
    assert points(5, 1, 9, 7).to_dict()["points"][1]["live_kl"] == 1


def test_what_does_not_belong_together_is_refused(lm, tiny, recording, replay):
    with pytest.raises(wb.UserError, match="Cannot check 0 points"):
        wb.check_replay(lm, recording, replay, points=0)
    with pytest.raises(wb.UserError, match="replay this recording first"):
        wb.check_replay(lm, wb.record(lm, ids(30), new_tokens=8), replay)
    other = wb.load((random_model("qwen2"), tiny.tokenizer))
    with pytest.raises(wb.UserError, match="its keys differ; give the model that was recorded"):
        wb.check_replay(other, recording, replay)
