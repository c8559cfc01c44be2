"""Figures of one replayed method: what it read token by token, and what it lost step by step."""

from __future__ import annotations

import numpy as np
import pytest

import workbench as wb


@pytest.fixture(scope="module")
def replay() -> wb.Replay:
    recording = wb.record(wb.load("tiny-dense"), "The statement is executed once for every item. " * 3, new_tokens=4)
    return wb.replay(recording, ["snapkv", "quest:page=4"], [0.4])


def test_a_map_holds_what_was_read(replay):
    for method in ("snapkv", "quest(page=4)"):
        drawn = wb.plots.replay_map(replay, method, 0.4, step=2).data[0].z
        assert drawn.shape == (len(replay.about["layers"]), replay.about["prompt_tokens"] + 3)
        heads = wb.plots.replay_map(replay, method, 0.4, step=2, layer=1).data[0].z
        for head, positions in enumerate(replay.read(method, 0.4, 1, 2)):
            assert np.flatnonzero(heads[head]).tolist() == positions.tolist()
        assert np.allclose(drawn[1], heads.mean(0))


def test_steps_show_one_layer_or_the_mean_of_all(replay):
    point = replay.point("snapkv", 0.4)
    mass, best = wb.plots.replay_steps(replay, "snapkv", 0.4, layer=3).data
    assert np.allclose(mass.y, point.mass_retained[3].mean(0)) and np.allclose(best.y, point.oracle_mass[3].mean(0))
    (error,) = wb.plots.replay_steps(replay, "snapkv", 0.4, y="output_error").data
    assert np.allclose(error.y, point.output_error.mean((0, 1)))
    assert np.mean(best.y) >= np.mean(mass.y)


def test_what_was_not_replayed_is_a_sentence(replay):
    with pytest.raises(wb.UserError, match="choose 'mass_retained' or 'output_error'"):
        wb.plots.replay_steps(replay, "snapkv", 0.4, y="score")
    with pytest.raises(wb.UserError, match="Layer 9 was not recorded"):
        wb.plots.replay_steps(replay, "snapkv", 0.4, layer=9)
    with pytest.raises(wb.UserError, match="There is no step 99"):
        wb.plots.replay_map(replay, "snapkv", 0.4, step=99)
