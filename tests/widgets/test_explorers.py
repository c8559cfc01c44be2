"""Explorers of recordings, traces and comparisons: what is chosen is shown, and what cannot be is one sentence."""

from __future__ import annotations

import numpy as np
import pytest

import workbench as wb
from workbench.trace.schema import TABLES

pytest.importorskip("ipywidgets", reason="needs the extra `notebook`")

PROMPT = "The statement is executed once for every item. " * 4


@pytest.fixture(scope="module")
def recording() -> wb.Recording:
    return wb.record(wb.load("tiny-dense"), PROMPT, new_tokens=6)


@pytest.fixture
def explorer(recording):
    opened = wb.widgets.ReplayExplorer(recording, "snapkv", methods=["snapkv", "streaming-llm"], budgets=[0.3, 0.8])
    yield opened
    opened.wait(60)
    opened.close()


def test_a_method_and_a_budget_are_shown(explorer, recording):
    explorer.choose(method="h2o", budget=0.2)
    assert explorer.method == wb.H2O(budget=0.2)
    assert explorer.point.setup == "h2o(budget=0.2)" and "h2o(budget=0.2)" in explorer.kept.figure.layout.title.text
    expected = wb.replay(recording, ["h2o"], [0.2])
    step = explorer.step.value
    for row, layer in enumerate(expected.about["layers"]):
        kept = expected.kept("h2o", 0.2, layer, step)
        assert np.allclose(explorer.kept.figure.data[0].z[row].sum(), sum(map(len, kept)) / len(kept))
    point = expected.point("h2o", 0.2)
    assert np.allclose(explorer.mass.figure.data[0].y, point.mass_retained.mean((0, 1)))
    assert np.allclose(explorer.lost.figure.data[0].y, point.output_error.mean((0, 1)))


def test_a_slider_redraws(explorer):
    before = explorer.kept.figure.data[0].z.sum()
    explorer.chooser.form.controls["budget"].share.value = 0.6
    assert explorer.point.budget == 0.6
    assert explorer.kept.figure.data[0].z.sum() > before
    ring = explorer.curves.figure.data[-1]
    assert ring.name == "chosen" and ring.x == (0.6,) and np.allclose(ring.y, explorer.point.mass_retained.mean())


def test_a_layer_shows_its_heads_at_a_step(explorer, recording):
    explorer.choose(layer=2, step=1)
    heads = recording.layers[2].keys.shape[0]
    assert explorer.kept.figure.data[0].z.shape == (heads, recording.prompt_tokens + 2)
    assert np.allclose(explorer.mass.figure.data[0].y, explorer.point.mass_retained[2].mean(0))
    explorer.choose(layer="all")
    assert len(explorer.kept.figure.data[0].z) == len(recording.layers)


def test_curves_of_all_methods_fill_in_beside_the_best_possible(explorer):
    explorer.wait(60)
    names = [line.name for line in explorer.curves.figure.data]
    assert {"snapkv", "streaming-llm", "chosen"} <= set(names) and any(name.startswith("best possible") for name in names)
    table = explorer.replay.curves()
    assert len(table[table["budget"].isin([0.3, 0.8])]) == 4
    explorer.column.value = "output_error"
    assert explorer.curves.figure.data[-1].y[0] == pytest.approx(explorer.point.output_error.mean())


def test_what_cannot_be_replayed_says_why_and_nothing_changes(explorer):
    assert set(explorer.chooser.entries) | set(explorer.missing) == set(wb.METHODS)
    for wrong, said in [
        ({"method": "dense"}, "no budget to replay"),
        ({"method": "snapkv", "budget": 7.0}, "cannot be 7.0"),
        ({"layer": 99}, "cannot be chosen"),
        ({"step": 99}, "no step 99"),
    ]:
        with pytest.raises(wb.UserError, match=said):
            explorer.choose(**wrong)
    assert explorer.method == wb.SnapKV() and explorer.error is None
    with pytest.raises(wb.UserError, match="no budget to replay"):
        wb.widgets.ReplayExplorer(explorer.recording, "dense")


def test_knobs_that_do_not_go_together_are_a_sentence_in_the_widget(explorer):
    explorer.choose("oracle", horizon=2) if "oracle" in explorer.chooser.entries else explorer.choose("random")
    explorer.choose("snapkv")
    explorer.chooser.form.controls["budget"].unit.value = "tokens"
    assert explorer.error is None and explorer.point.budget == 128


@pytest.fixture
def opened(recording):
    shown = wb.widgets.TraceExplorer(recording.trace)
    yield shown
    shown.close()


def test_every_view_of_a_trace_shows_or_says_why(tiny):
    from workbench.widgets.trace_explorer import VIEWS

    session = wb.Session(tiny, wb.H2O(budget=0.3), importance="decode")
    session.prefill(PROMPT)
    session.generate(3)
    shown = wb.widgets.TraceExplorer(session.trace)
    for view in VIEWS:
        shown.choose(view)
        assert shown.error is None and (shown.table is not None or len(shown.picture.figure.data))
    shown.choose("summary")
    assert "<td>decode</td>" in shown._table.value and shown.picture.layout.display == "none"
    shown.close()


def test_a_part_of_a_trace_is_chosen(opened):
    opened.choose("summary", phase="decode")
    assert opened.table["phase"].tolist() == ["decode"]
    opened.choose(phase="all", steps=range(1, 3))
    assert opened.table["steps"].sum() == 2
    opened.choose(steps="all", layers=[0])
    assert set(opened.selected.table("attention")["layer"]) == {0}
    with pytest.raises(wb.UserError, match="No forward call lies"):
        opened.choose(phase="prefill", steps=range(2, 3))
    assert opened.phase.value == "all" and opened.steps.value == (opened.steps.min, opened.steps.max)
    for wrong, said in [({"view": "x"}, "no view 'x'"), ({"phase": "verify"}, "no phase"), ({"layers": [9]}, "no layers")]:
        with pytest.raises(wb.UserError, match=said):
            opened.choose(**wrong)


def test_a_view_without_its_data_is_a_sentence(opened):
    opened.view.value = "importance"
    assert "holds no importance" in opened.error and "holds no importance" in opened._sentence.value
    opened.view.value = "KV bytes"
    assert opened.error is None


def test_sql_answers_as_text(opened, tmp_path):
    assert opened.sql("select count(*) as n from steps")["n"].tolist() == [len(opened.trace.table("steps"))]
    opened.sql("select '<script>x</script>' as shown")
    assert "&lt;script&gt;" in opened._answer.value and "<script>" not in opened._answer.value
    opened.sql("select * from range(1000)")
    assert "The first 200 of 1,000 rows." in opened._answer.value
    for query in (
        "select nothing from nowhere",
        f"copy steps to '{tmp_path / 'out.csv'}'",
        "select * from read_text('README.md')",
    ):
        opened.query.value = query
        opened._ask.click()
        assert opened.error.startswith("The query failed")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def comparison() -> wb.Comparison:
    methods = [wb.SnapKV(budget=0.5), wb.SnapKV(budget=0.9)]
    return wb.compare(wb.load("tiny-dense"), wb.workloads.recall(context=96, samples=1, facts=2), methods)


def test_a_comparison_is_explored(comparison):
    shown = wb.widgets.CompareExplorer(comparison)
    assert shown.error is None
    assert [line.name for line in shown.turns.figure.data] == [row.setup for row in comparison.rows]
    shown.choose(x="tpot_s", y="kl_to_dense", column="kl_to_dense", setup="snapkv(budget=0.5)")
    assert "KL" in shown.pareto.figure.layout.yaxis.title.text and "KL" in shown.scores.figure.layout.title.text
    assert "snapkv(budget=0.5)" in shown.kept.figure.layout.title.text
    with pytest.raises(wb.UserError, match="cannot be chosen as setup"):
        shown.choose(setup="nope")
    with pytest.raises(wb.UserError, match="there are x, y, column, setup"):
        shown.choose(z="score")
    assert shown.setup.value == "snapkv(budget=0.5)"
    shown.close()


@pytest.fixture(scope="module")
def routed() -> wb.Trace:
    session = wb.Session(wb.load("tiny-moe"), routing="logits")
    session.prefill([PROMPT, "A name"])
    session.generate(3, stop_at_end=False)
    return session.trace


def test_every_view_of_routing_shows_what_it_is_about(routed):
    from workbench.widgets.routing_explorer import VIEWS

    shown = wb.widgets.RoutingExplorer(routed)
    assert "Expert load" in shown.picture.figure.layout.title.text and "<td>" in shown._table.value
    for view in VIEWS:
        shown.choose(view=view, layer=2, row=1, tokens=range(1, 3))
        assert shown.error is None and len(shown.picture.figure.data)
        if view == "lanes":
            assert len(shown.picture.figure.data[0].x) == 2
        if view == "pairs":
            assert "layer 2" in shown.picture.figure.layout.title.text
    shown.choose(view="expert cache", slots=3, phase="decode")
    assert set(shown.table["slots"]) == {3} and "decode" in shown.phase.value
    assert shown.table["requests"].iloc[0] == len(shown.selected.table("routing").query("tokens > 0"))
    shown.view.value = "load"
    assert shown.table["steps"].tolist() == [3, 3, 3, 3]
    shown.close()


def test_routing_that_cannot_be_shown_is_one_sentence_and_nothing_changes(routed, recording):
    shown = wb.widgets.RoutingExplorer(routed, "lanes")
    for wrong, said in [
        ({"view": "x"}, "'x' cannot be chosen as view"),
        ({"layer": 9}, "9 cannot be chosen as layer; there are all, 0, 1, 2, 3"),
        ({"slots": 0}, "slots cannot be 0; choose from 1 to 8"),
        ({"tokens": range(0)}, "tokens cannot be"),
        ({"tokens": range(2, 900)}, "tokens cannot be"),
        ({"colour": 1}, "'colour' cannot be chosen"),
    ]:
        with pytest.raises(wb.UserError, match=said):
            shown.choose(**wrong)
    assert (shown.view.value, shown.layer.value, shown.slots.value) == ("lanes", "all", 4)
    with pytest.raises(wb.UserError, match="No expert was called"):
        wb.widgets.RoutingExplorer(recording.trace)
    loads = wb.Trace(routed.meta, {**{name: routed.arrow(name) for name in TABLES}, "choices": TABLES["choices"].empty_table()})
    bare = wb.widgets.RoutingExplorer(loads)
    bare.view.value = "lanes"
    assert 'record it with routing="choices"' in bare.error
    with pytest.raises(wb.UserError, match="routing="):
        bare.choose(view="pairs")
    bare.choose(view="in flight")
    assert bare.error is None


def test_widgets_are_found_by_their_folder():
    assert {"CompareExplorer", "Lab", "ReplayExplorer", "RoutingExplorer", "TraceExplorer"} <= set(dir(wb.widgets))
    with pytest.raises(AttributeError, match="no widget 'Nope'"):
        wb.widgets.Nope  # noqa: B018 (the access is the test)
