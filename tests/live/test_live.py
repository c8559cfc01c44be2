"""Live runs: what they show equals the trace, and a player obeys between tokens and lets others have their turn."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

import workbench as wb
from workbench.live import LiveRun, Player, line_of
from workbench.plots.cache_map import kept_share
from workbench.trace.snapshot import HISTORY

PROMPT = "The statement is executed once for every item. " * 6


@pytest.fixture(scope="module")
def lm() -> wb.LM:
    return wb.load("tiny-dense")


def until(condition) -> None:
    while not condition():
        time.sleep(0.01)


@pytest.fixture
def player():
    playing = Player(period_s=0.0)
    yield playing
    playing.close()
    playing.wait(20)


def test_a_snapshot_equals_the_trace(lm):
    run = LiveRun(lm, wb.H2O(budget=0.3), follow=True)
    run.read(PROMPT)
    for count in range(6):
        run.advance()
        if count % 2:
            run.snapshot()  # read piece by piece, it is the same as read at once
    held_before = run.snapshot().held
    run.advance()
    seen, trace = run.snapshot(), run.session.trace
    assert list(seen.history) == list(HISTORY)
    steps = trace.table("steps")
    assert seen.history["step"].tolist() == steps["step"].tolist()
    assert seen.history["duration_ns"].tolist() == steps["duration_ns"].tolist()
    assert seen.history["flops"].sum() == trace.flops()
    assert seen.history["moved_bytes"].sum() == trace.bytes()
    assert seen.history["kv_physical_bytes"].iloc[-1] == run.session.physical_bytes
    assert np.array_equal(seen.held, kept_share(trace)) and seen.held.min() < 1
    assert "".join(seen.texts) == "".join(trace.table("tokens")["text"])
    assert seen.new_text == "".join(seen.texts[-7:])
    assert seen.mass.shape == seen.held.shape
    assert np.allclose(seen.mass.sum(1), 1, atol=2e-2) and not seen.mass[:, :-1][held_before == 0].any()
    quality = seen.history[seen.history["phase"] == "decode"]
    assert (quality["kl_to_dense"] > 0).any() and quality["entropy"].notna().all()
    assert seen.experts is None


def test_the_dense_run_that_follows_is_its_own_equal(lm):
    run = LiveRun(lm, None, follow=True)
    run.read(PROMPT)
    run.advance()
    run.ask(" And then?")
    run.advance()
    quality = run.snapshot().history.query("phase != 'prefill'")
    assert (quality["kl_to_dense"] < 1e-6).all() and quality["agrees"].all()


def test_a_branch_knows_what_was_before_and_shares_nothing(lm):
    run = LiveRun(lm, wb.SnapKV(budget=0.5))
    run.read(PROMPT)
    run.advance()
    other = run.branch("branch 1")
    other.swap(wb.StreamingLLM(budget=16))
    for _ in range(3):
        other.advance()
    before, after = run.snapshot(), other.snapshot()
    assert len(before.history) == 2 and len(after.history) == 5
    assert after.history.iloc[:2].equals(before.history)
    assert after.swaps == ((2, "streaming-llm(budget=16)"),) and before.swaps == ()
    assert after.held[:, : len(before.texts)].sum() < before.held.sum()


def test_expert_load_is_counted():
    moe = wb.load("tiny-moe")
    run = LiveRun(moe)
    run.read(PROMPT)
    run.advance()
    seen = run.snapshot()
    routing = run.session.trace.table("routing")
    assert seen.experts.sum() == routing["tokens"].sum() > 0
    assert seen.experts.shape == (len(seen.expert_layers), 8) or seen.experts.shape[0] == len(seen.expert_layers)


def test_a_player_swaps_between_two_tokens(lm, player):
    player.start(lm, wb.SnapKV(budget=0.5), PROMPT, 10)
    player.wait(60)
    player.swap(wb.StreamingLLM(budget=8))
    player.play(5)
    player.wait(60)
    seen = player.snapshots["run"]
    decoded = seen.history[seen.history["phase"] == "decode"]
    assert decoded["setup"].tolist() == ["snapkv(budget=0.5)"] * 10 + ["streaming-llm(budget=8)"] * 5
    assert decoded["kv_physical_bytes"].iloc[-1] < decoded["kv_physical_bytes"].iloc[0]
    assert player.error is None and not player.busy and player.status == "idle"
    assert player.trace().setup == "snapkv(budget=0.5), then streaming-llm(budget=8)"


def test_both_futures_go_on_side_by_side(lm, player):
    player.start(lm, None, PROMPT, 3)
    player.wait(60)
    player.branch(wb.StreamingLLM(budget=8))
    player.play(4)
    player.wait(60)
    assert {name: len(seen.history) for name, seen in player.snapshots.items()} == {"run": 8, "branch 1": 8}
    player.ask(" And then?", 2)
    player.wait(60)
    assert {seen.history["phase"].iloc[-3] for seen in player.snapshots.values()} == {"append"}


def test_stop_and_continue(lm, player):
    player.start(lm, None, PROMPT, 10_000)
    until(lambda: player.snapshots)
    player.stop()
    player.wait(60)
    stopped = len(player.snapshots["run"].history)
    player.play(2)
    player.wait(60)
    assert len(player.snapshots["run"].history) == stopped + 2


def test_a_player_closed_between_two_tokens_ends(lm):
    for _ in range(5):
        player = Player(period_s=0.0)
        player.start(lm, None, PROMPT, 10_000)
        until(lambda player=player: player.snapshots)
        player.close()
        until(lambda player=player: player.status == "closed")


def test_what_is_wrong_is_said_and_the_player_lives_on(lm, player):
    player.play(3)
    player.wait(20)
    assert player.error == "There is no run yet; start one first."
    player.start(lm, None, "", 3)
    player.wait(20)
    assert player.error.startswith("The prompt is empty")
    player.start(lm, None, PROMPT, 1)
    player.wait(60)
    assert player.error is None and len(player.snapshots["run"].history) == 2
    player.start(lm, None, [1] * (lm.anatomy.max_positions - 2), 10)
    player.wait(60)
    assert "do not fit" in player.error


def test_one_player_at_a_time_and_others_see_the_line(lm, player):
    with line_of(lm.model).turn("somebody else") as mine:
        assert mine
        player.start(lm, None, PROMPT, 1)
        until(lambda: player.status.startswith("waiting"))
        assert player.status == "waiting: 1 before you"
        assert line_of(lm.model).names == ("somebody else", "run")
        player.stop()
        player.wait(20)
        assert line_of(lm.model).names == ("somebody else",) and not player.snapshots
    player.start(lm, None, PROMPT, 1)
    player.wait(60)
    assert len(player.snapshots["run"].history) == 2


def test_a_player_that_left_the_line_of_another_model_goes_on_in_that_of_its_own(lm, player):
    other = wb.load("tiny-moe")
    player.start(lm, None, PROMPT, 1)
    player.wait(60)
    with line_of(other.model).turn("somebody else"):
        player.start(other, None, PROMPT, 1)
        until(lambda: player.status.startswith("waiting"))
        assert player.lm is other
        player.stop()
        player.wait(20)
        assert player.lm is lm
        player.play(2)
        player.wait(60)
    assert player.error is None and len(player.snapshots["run"].history) == 4


def test_turns_come_in_order():
    class Model:
        pass

    model, order, first = Model(), [], threading.Event()

    def take(name: str) -> None:
        with line_of(model).turn(name):
            order.append(name)

    with line_of(model).turn("a"):
        threads = []
        for number, name in enumerate("bcd", 2):
            threads.append(threading.Thread(target=take, args=(name,)))
            threads[-1].start()
            while len(line_of(model).names) < number:
                first.wait(0.001)
    for thread in threads:
        thread.join()
    assert order == list("bcd")


def test_a_player_nobody_watches_stops(lm):
    player = Player(period_s=0.0, unwatched_s=0.05)
    player.start(lm, None, PROMPT, 10_000)
    player.wait(60)
    assert player.error.startswith("Stopped: nobody has looked")
    player.close()
    with pytest.raises(wb.UserError, match="closed"):
        player.play(1)


def test_a_stop_holds_whatever_is_ordered_after_it(lm, player):
    player.start(lm, None, PROMPT, 10_000)
    until(lambda: player.snapshots)
    player.stop()
    player.swap(wb.StreamingLLM(budget=8))
    player.wait(60)
    stopped = len(player.snapshots["run"].history)
    assert player.snapshots["run"].setup == "streaming-llm(budget=8)" and stopped < 1000
    player.play(2)
    player.wait(60)
    assert len(player.snapshots["run"].history) == stopped + 2
