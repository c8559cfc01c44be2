"""Steps of several tokens, measured beside MoESD's prediction."""

from __future__ import annotations

import pytest

import workbench as wb
from workbench.cost.routing import expected_unique
from workbench.cost.verification import target_efficiency
from workbench.experiments.verifying import verifying


def test_experts_and_seconds_of_steps_of_several_tokens():
    lm = wb.load("tiny-moe")
    table = verifying(lm, gamma=3, batch=2, context=16, rounds=2, passes=1, hardware="h100-sxm").set_index("tokens_a_row")
    assert table.index.tolist() == [1, 2, 3, 4] and (table["tokens"] == 2 * table.index).all()
    assert table["predicted_unique"].tolist() == pytest.approx([expected_unique(2 * size, 8, 2) for size in (1, 2, 3, 4)])
    assert (table["measured_unique"] >= 2).all() and (table["measured_unique"] <= 8).all()
    assert table.loc[4, "measured_unique"] > table.loc[1, "measured_unique"]
    # a step's tokens have two experts each, so those hit times their load are all choices, in every step and layer
    assert table.loc[1, "measured_load"] * table.loc[1, "measured_unique"] >= 4 - 1e-9
    assert (table["measured_step_s"] > 0).all() and table.loc[1, "measured_target_efficiency"] == 1
    assert table.loc[4, "predicted_target_efficiency"] == target_efficiency(lm.anatomy, 3, batch=2, context=16)
    assert table["predicted_target_efficiency_on_sheet"].is_monotonic_decreasing


def test_what_cannot_be_verified_gets_a_sentence():
    with pytest.raises(wb.UserError, match="tiny-dense has no experts"):
        verifying(wb.load("tiny-dense"))
    with pytest.raises(wb.UserError, match="gamma cannot be 0"):
        verifying(wb.load("tiny-moe"), gamma=0)
