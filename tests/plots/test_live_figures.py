"""Figures of a run that goes on draw what its snapshot says, at any moment of it."""

from __future__ import annotations

import dataclasses

import numpy as np
import pandas as pd
import pytest

import workbench as wb
from workbench.live import LiveRun
from workbench.plots.live_curve import MAX_POINTS
from workbench.plots.matrix import MAX_COLUMNS
from workbench.plots.theme import method_colours
from workbench.trace.snapshot import HISTORY, Snapshot

PROMPT = "The statement is executed once for every item. " * 4
QUANTITIES = [name for name in HISTORY if name not in ("step", "phase", "setup")]


@pytest.fixture(scope="module")
def runs(tiny) -> dict[str, Snapshot]:
    """A run with a swap and a further turn, and a branch of it."""
    run = LiveRun(tiny, wb.H2O(budget=0.5), follow=True)
    run.read(PROMPT)
    for _ in range(4):
        run.advance()
    branch = run.branch("branch 1")
    branch.swap(wb.SnapKV(budget=0.2))
    run.swap(wb.StreamingLLM(budget=32))
    run.ask(" And then?")
    for _ in range(3):
        run.advance()
        branch.advance()
    return {"run": run.snapshot(), "branch 1": branch.snapshot()}


@pytest.fixture(scope="module")
def run(runs) -> Snapshot:
    return runs["run"]


@pytest.fixture(scope="module")
def unread(tiny) -> Snapshot:
    return LiveRun(tiny).snapshot()


def lines(figure):
    return [trace for trace in figure.data if trace.type == "scatter"]


def test_a_curve_is_the_history_in_the_colour_of_the_method_in_force(run):
    drawn = lines(wb.plots.live_curve({"run": run}))
    colours = method_colours(["h2o", "streaming-llm"])
    solid = [line for line in drawn if line.line.dash == "solid"]
    assert [line.line.color for line in solid] == [colours["h2o"], colours["streaming-llm"]]
    held = run.history.set_index("step")["kv_physical_bytes"]
    for line in solid:
        assert list(line.y) == held.loc[list(line.x)].tolist()
    assert solid[0].x[-1] == solid[1].x[0] == run.swaps[0][0] - 1  # one line, that only changes its colour
    assert {line.line.dash for line in drawn} == {"solid", "dot"}


def test_a_swap_is_marked_with_the_new_setup(run):
    figure = wb.plots.live_curve({"run": run}, "entropy")
    (step, label) = run.swaps[0]
    assert [shape.x0 for shape in figure.layout.shapes] == [step]
    assert [mark.text for mark in figure.layout.annotations] == [label]


def test_only_decode_steps_are_drawn_where_the_prompt_would_dwarf_them(run):
    for column, factor in (("flops", 1), ("moved_bytes", 1), ("duration_ns", 1e-6)):
        figure = wb.plots.live_curve({"run": run}, column)
        decode = run.history[run.history["phase"] == "decode"]
        assert {x for line in lines(figure) for x in line.x} == set(decode["step"])
        assert max(y for line in lines(figure) for y in line.y) == pytest.approx(decode[column].max() * factor)
        assert "decode steps only" in figure.layout.title.text


def test_agreement_is_a_running_share(run):
    drawn = lines(wb.plots.live_curve({"run": run}, "agrees"))
    assert drawn[-1].y[-1] == pytest.approx(run.history["agrees"].dropna().astype(float).mean())


def test_runs_differ_in_their_dashes_and_names(runs):
    drawn = lines(wb.plots.live_curve(runs, "kl_to_dense"))
    looks = {(line.name.partition(":")[0], line.line.dash) for line in drawn}
    assert len(looks) == len(runs) == len({dash for _, dash in looks})


def test_a_long_line_is_thinned_evenly_and_keeps_its_ends_and_its_swap(run):
    steps = 5000
    history = pd.DataFrame({name: [run.history[name].iloc[-1]] * steps for name in HISTORY})
    history["step"], history["phase"] = range(steps), "decode"
    history.loc[:1233, "setup"] = "dense"
    long = dataclasses.replace(run, history=history, swaps=((1234, run.setup),))
    first, second = lines(wb.plots.live_curve({"run": long}, "entropy"))
    assert first.x[0] == 0 and second.x[1] == 1234 and second.x[-1] == steps - 1
    assert len(first.x) + len(second.x) <= MAX_POINTS + 2 and max(np.diff(first.x)) <= 10


@pytest.mark.parametrize("column", QUANTITIES)
def test_every_quantity_of_the_history_can_be_drawn_at_any_moment(runs, unread, column):
    assert lines(wb.plots.live_curve(runs, column))
    for nothing in ({}, {"run": unread}):
        figure = wb.plots.live_curve(nothing, column)
        assert figure.layout.xaxis.title.text and figure.layout.yaxis.title.text and not figure.data
        assert figure.layout.annotations[0].text == "Nothing was run yet."


def test_what_cannot_be_drawn_is_said(runs):
    with pytest.raises(wb.UserError, match="Cannot draw 'colour' of a run; choose one of context"):
        wb.plots.live_curve(runs, "colour")


def test_without_a_dense_run_the_curve_says_so(run):
    history = run.history.assign(agrees=pd.array([None] * len(run.history), dtype="boolean"))
    figure = wb.plots.live_curve({"run": dataclasses.replace(run, history=history)}, "agrees")
    assert figure.layout.annotations[0].text == "No dense run follows."


def test_maps_show_what_the_snapshot_holds(run):
    held, attention = wb.plots.held_map(run), wb.plots.attention_map(run)
    assert np.array_equal(held.data[0].z, run.held)
    assert np.array_equal(attention.data[0].customdata, run.mass)
    assert held.data[0].text[0][1] == repr(run.texts[1])
    begun = [position for position in range(1, len(run.phases)) if run.phases[position] != run.phases[position - 1]]
    assert {shape.x0 for shape in held.layout.shapes} == {position - 0.5 for position in begun} and len(begun) == 3


def test_a_wide_map_is_averaged_into_fewer_columns(run):
    positions = 2 * MAX_COLUMNS + 1
    held = np.zeros((2, positions))
    held[:, -1] = 1
    wide = dataclasses.replace(run, held=held, texts=("a",) * positions, phases=("prefill",) * positions)
    drawn = wb.plots.held_map(wide).data[0]
    assert drawn.z.shape[1] <= MAX_COLUMNS and drawn.z[0, -1] == pytest.approx(1 / (positions - drawn.x[-1]))
    assert drawn.text[0][0] == "'a' 'a' 'a'"


def test_maps_of_a_run_that_read_nothing_are_empty_axes(unread):
    for draw, sentence in ((wb.plots.held_map, "Nothing was read"), (wb.plots.attention_map, "No attention was observed")):
        figure = draw(unread)
        assert not figure.data and figure.layout.xaxis.title.text == "position in the text"
        assert figure.layout.annotations[0].text.startswith(sentence)


def test_the_load_of_experts(run):
    moe = wb.load("tiny-moe")
    live = LiveRun(moe)
    assert "No token was routed" in wb.plots.expert_load(live.snapshot()).layout.annotations[0].text
    live.read(PROMPT)
    live.advance()
    snapshot = live.snapshot()
    drawn, of_trace = (wb.plots.expert_load(each).data[0] for each in (snapshot, live.session.trace))
    assert np.array_equal(drawn.customdata, snapshot.experts) and np.array_equal(drawn.customdata, of_trace.customdata)
    np.testing.assert_allclose(drawn.z.sum(1), 1)
    with pytest.raises(wb.UserError, match="tiny-dense has no experts"):
        wb.plots.expert_load(run)


def test_a_trace_without_experts_has_no_load(tiny):
    session = wb.Session(tiny)
    session.prefill("One.")
    with pytest.raises(wb.UserError, match="has no experts"):
        wb.plots.expert_load(session.trace)
