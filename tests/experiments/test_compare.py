"""Comparisons: fidelity by hand, rows that add up, and the trade-off on the trained model."""

from __future__ import annotations

import json
import math

import pytest
import torch

import workbench as wb
from workbench.experiments.fidelity import kl_to_dense, negative_log_likelihood, top1_agreement
from workbench.report import report_html
from workbench.testing import random_gemma
from workbench.workloads import parse_workload


def test_fidelity_by_hand():
    dense = torch.tensor([[0.0, math.log(3)], [0.0, 0.0]])  # probabilities 1/4, 3/4 and 1/2, 1/2
    other = torch.tensor([[0.0, 0.0], [0.0, 0.0]])
    # KL of (1/4, 3/4) to (1/2, 1/2): 1/4 ln(1/2) + 3/4 ln(3/2)
    expected = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert kl_to_dense(dense, other).tolist() == pytest.approx([expected, 0.0], abs=1e-6)
    assert top1_agreement(dense, other).tolist() == [0.0, 1.0]
    assert negative_log_likelihood(dense, torch.tensor([1, 0])).tolist() == pytest.approx([-math.log(0.75), math.log(2)])


@pytest.fixture(scope="module")
def comparison(tiny) -> wb.Comparison:
    methods = [cls(budget=budget) for budget in (0.75, 0.2) for cls in (wb.StreamingLLM, wb.H2O, wb.SnapKV)]
    return wb.compare(tiny, wb.workloads.recall(context=384, samples=4), methods)


def test_dense_is_the_baseline(comparison):
    dense = comparison.rows[0]
    assert dense.setup == "dense" and dense.score >= 0.9
    assert dense.kl_to_dense == 0 and dense.top1_agreement == 1 and dense.steps == 0


def test_the_trade_off(comparison):
    """Bytes fall with the budget, quality too, and methods differ from dense and from each other."""
    table = comparison.table.set_index("setup")
    for name in ("streaming-llm", "h2o", "snapkv"):
        roomy, tight = table.loc[f"{name}(budget=0.75)"], table.loc[f"{name}(budget=0.2)"]
        assert table.loc["dense", "kv_physical_bytes"] > roomy["kv_physical_bytes"] > tight["kv_physical_bytes"]
        assert roomy["kv_nominal_bytes"] > tight["kv_nominal_bytes"]
        assert roomy["kl_to_dense"] < tight["kl_to_dense"]
        assert tight["score"] < table.loc["dense", "score"]
    assert table["score"].nunique() >= 4


def test_every_method_fired(comparison):
    for row in comparison.rows[1:]:
        assert row.fired_layers == row.layers == 4
        assert row.fired_steps == row.steps > 0


def test_missing_numbers_say_why(comparison):
    for row in comparison.rows:
        assert (row.joules is None) == (row.joules_reason is not None)
        assert (row.peak_memory_bytes is None) == (row.peak_memory_reason is not None)


def test_save_and_load(comparison, tmp_path):
    loaded = wb.Comparison.load(comparison.save(tmp_path))
    assert loaded.rows == comparison.rows and loaded.about == comparison.about
    assert loaded.traces.keys() == comparison.traces.keys()
    (tmp_path / "comparison.json").write_text("{}")
    with pytest.raises(wb.UserError, match="damaged"):
        wb.Comparison.load(tmp_path)
    with pytest.raises(wb.UserError, match="holds no comparison"):
        wb.Comparison.load(tmp_path / "nowhere")
    json.dumps(comparison.to_dict())


def test_scores_by_turn_and_depth_add_up(comparison):
    assert list(comparison.turns.columns) == [1, 2, 3, 4] and list(comparison.depths.columns) == [12, 38, 62, 88]
    assert list(comparison.turns.index) == [row.setup for row in comparison.rows]
    for row in comparison.rows:
        assert comparison.turns.loc[row.setup].mean() == pytest.approx(row.score)
        assert comparison.depths.loc[row.setup].mean() == pytest.approx(row.score)
    streaming = comparison.depths.loc["streaming-llm(budget=0.2)"]
    assert streaming[88] >= streaming[38]  # the end of the context is what it keeps
    page = report_html(comparison)
    assert "Question by question" in page and "By depth" in page


@pytest.mark.parametrize("workload", ["needle:depths=2", "copy", "recall:facts=5", "text"])
def test_every_workload_runs_on_the_built_in_models(tiny, workload):
    chosen = parse_workload(workload, context=96, samples=1)
    dense, other = wb.compare(tiny, chosen, ["snapkv:budget=0.5"]).rows
    for row in (dense, other):
        assert 0 <= row.score <= 1 and row.nll > 0 and len(row.turn_scores) == getattr(chosen, "facts", 1)
    assert other.steps == other.fired_steps > 0


def test_query_aware_is_easier(tiny):
    seen, unseen = (
        wb.compare(tiny, wb.workloads.recall(context=256, samples=3, query_aware=aware), [wb.SnapKV(budget=0.25)])
        for aware in (True, False)
    )
    assert seen.rows[1].score > unseen.rows[1].score


def test_text_workload(tiny):
    comparison = wb.compare(tiny, wb.workloads.text(context=200, samples=2, continuation=16), ["streaming-llm:budget=0.3"])
    dense, streaming = comparison.rows
    assert 0 < dense.score < 1 and dense.nll < streaming.nll + 0.2
    assert streaming.kl_to_dense > 0


def test_only_sliding_layers(tiny):
    lm = wb.load((random_gemma(layer_types=["sliding_attention"] * 3, vocab_size=1536), tiny.tokenizer))
    with pytest.raises(wb.MethodDidNotFire, match=r"all 3 layers .* sliding-window"):
        wb.compare(lm, wb.workloads.text(context=64, samples=1, continuation=4), [wb.H2O()])


def test_budget_over_the_context_is_not_a_failure(tiny):
    comparison = wb.compare(tiny, wb.workloads.recall(context=96, samples=1, facts=1), [wb.SnapKV(budget=500)])
    assert comparison.rows[1].fired == "nothing to do"
    assert comparison.rows[1].score == comparison.rows[0].score


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"context": 9000}, "do not fit tiny-dense, whose context is 8192"),
        ({"context": 30}, "4 facts need"),
        ({"context": 2}, "context=2"),
        ({"samples": 0}, "samples=0"),
        ({"facts": 100}, "1 to 24 facts, not 100"),
    ],
)
def test_bad_workloads(tiny, settings, message):
    with pytest.raises(wb.UserError, match=message):
        wb.compare(tiny, wb.workloads.recall(**settings), [])
