"""Figures are functions of values: they draw what the value says and nothing else."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go
import pytest
import torch

import workbench as wb
from workbench.plots.cache_map import kept_share
from workbench.plots.pareto import frontier
from workbench.plots.theme import DENSE_COLOUR, human_bytes, method_colours, method_symbol
from workbench.testing import ids, random_gemma, random_llama


@pytest.fixture(scope="module")
def comparison(tiny) -> wb.Comparison:
    return wb.compare(tiny, wb.workloads.recall(context=128, samples=2, facts=2), ["h2o:budget=0.5", "snapkv:budget=0.5"])


def test_pareto(comparison):
    figure = comparison.pareto()
    points = {trace.name: (list(trace.x), list(trace.y)) for trace in figure.data}
    table = comparison.table.set_index("setup")
    assert points["dense"] == ([table.loc["dense", "kv_physical_bytes"]], [table.loc["dense", "score"]])
    assert "bytes" in figure.layout.xaxis.title.text
    with pytest.raises(wb.UserError, match="Cannot draw 'colour'"):
        comparison.pareto(x="colour")
    with pytest.raises(wb.UserError, match="Cannot draw 'setup'"):
        comparison.pareto(x="setup")


def test_replay_curves(tiny):
    recording = wb.record(tiny, ids(40), new_tokens=6)
    replay = wb.replay(recording, ["h2o", "snapkv:window=8", "knorm"], [0.25, 20, 1, 1.0])
    check = wb.check_replay(tiny, recording, replay, points=3)
    figure = wb.plots.replay_curves(replay, check)
    lines = {trace.name: trace for trace in figure.data}
    curves = replay.curves()
    for method, rows in curves.groupby("method"):
        assert list(lines[method].x) == [1 / 40, 0.25, 0.5, 1.0]
        assert sorted(lines[method].y) == sorted(rows["mass_retained"])
    bounds = [trace for trace in figure.data if trace.name.startswith("best possible")]
    assert [trace.name for trace in bounds] == ["best possible: h2o", "best possible: snapkv(window=8), knorm"]
    assert all(trace.line.dash == "dash" for trace in bounds)
    live = lines["run live"]
    assert [row[0] for row in live.customdata] == [point.setup for point in check.points]
    assert set(live.y) <= set(curves["mass_retained"])
    assert str(check) in figure.layout.title.text
    assert not any(trace.name == "run live" for trace in wb.plots.replay_curves(replay, y="output_error").data)
    with pytest.raises(wb.UserError, match="Cannot draw 'kl'"):
        wb.plots.replay_curves(replay, y="kl")


def test_frontier_by_hand(comparison):
    table = comparison.table.iloc[[0, 0, 0, 0]].reset_index(drop=True)
    table["kv_physical_bytes"], table["score"] = [4, 3, 2, 1], [0.9, 0.5, 0.6, 0.1]
    assert frontier(table, "kv_physical_bytes", "score").index.tolist() == [3, 2, 0]
    table["kl_to_dense"] = [0.0, 0.4, 0.5, 2.0]
    assert frontier(table, "kv_physical_bytes", "kl_to_dense").index.tolist() == [3, 2, 1, 0]


def test_kv_bytes(comparison):
    figure = wb.plots.kv_bytes(comparison.traces)
    assert len(figure.data) == 2 * len(comparison.traces)
    assert isinstance(wb.plots.kv_bytes(comparison.traces["dense"]), go.Figure)


def test_cache_map_shows_what_the_store_holds(tiny):
    session = wb.Session(tiny, wb.H2O(budget=12))
    session.prefill(ids(40)[0].tolist())
    session.generate(3)
    share = kept_share(session.trace)
    for layer, cache in enumerate(session._cache.layers):
        held = np.zeros(43)
        for head in cache.store.positions[0].tolist():
            held[head] += 1 / len(cache.store.positions[0])
        np.testing.assert_allclose(share[layer], held, atol=1e-9)
    figure = wb.plots.cache_map(session.trace)
    assert figure.data[0].z.shape == (4, 43)


def test_cache_map_of_sliding_layers(tiny):
    session = wb.Session(wb.load((random_gemma(), tiny.tokenizer)))
    session.prefill(ids(40)[0].tolist())
    assert kept_share(session.trace).sum(1).tolist() == [15, 40, 15]


def test_components_and_importance():
    model = random_llama()
    with wb.profile(model, importance="full") as prof, torch.no_grad():
        model(ids(12))
    bars = wb.plots.components(prof.trace)
    assert sum(bar.y[0] * 12 for bar in bars.data) == pytest.approx(prof.trace.flops())
    moved = wb.plots.components(prof.trace, of="bytes")
    assert sum(bar.y[0] * 12 for bar in moved.data) == pytest.approx(prof.trace.bytes())
    mass = wb.plots.importance_map(prof.trace).data[0].customdata
    np.testing.assert_allclose(mass.sum(1), 1.0, atol=5e-3)  # a query's attention sums to one
    with pytest.raises(wb.UserError, match="choose 'flops' or 'bytes'"):
        wb.plots.components(prof.trace, of="time")
    with pytest.raises(wb.UserError, match="no importance for step 9"):
        wb.plots.importance_map(prof.trace, step=9)


def test_roofline():
    prediction = wb.predict(wb.anatomy(random_gemma().config), "h100-sxm", dtype="bf16", context=64)
    figure = wb.plots.roofline(prediction)
    roof, *drawn = figure.data
    sheet, points = prediction.hardware, prediction.table[prediction.table["flops"] > 0]
    assert roof.x[1] == sheet.ridge("bf16") and roof.y[1:] == (sheet.peak("bf16"), sheet.peak("bf16"))
    assert roof.y[0] == pytest.approx(roof.x[0] * sheet.bandwidth)
    assert {component.name for component in drawn} == set(points["component"])
    assert sum(len(component.x) for component in drawn) == len(points) and len(set(drawn[0].marker.symbol)) == 2
    for component in drawn:  # nothing lies above the roof
        reach = np.minimum(np.array(component.x) * sheet.bandwidth, sheet.peak("bf16"))
        assert (np.array(component.y) <= reach * (1 + 1e-9)).all()
    assert figure.layout.xaxis.type == figure.layout.yaxis.type == "log" and "predicted" in figure.layout.yaxis.title.text


def test_importance_of_a_session_is_by_position_after_eviction(tiny):
    session = wb.Session(tiny, wb.StreamingLLM(budget=10), importance="full")
    session.prefill(ids(40)[0].tolist())
    session.step()
    last = session.trace.table("importance").query("step == 1")
    for mass in last["mass"]:
        assert len(mass) == 41 and mass.sum() == pytest.approx(1, abs=5e-3)
        assert (mass[4:34] == 0).all()
    assert max(mass[40] for mass in last["mass"]) > 0


def test_no_importance_recorded(comparison):
    with pytest.raises(wb.UserError, match="holds no importance"):
        wb.plots.importance_map(comparison.traces["dense"])


def test_colours_and_units():
    colours = method_colours(["dense", "h2o(budget=0.2)", "snapkv(budget=0.2)", "h2o(budget=0.5)"])
    assert colours["dense"] == DENSE_COLOUR and colours["h2o(budget=0.2)"] == colours["h2o(budget=0.5)"]
    assert len(set(colours.values())) == 3
    assert [human_bytes(count) for count in (0, 1023, 1536, 5 * 2**30)] == ["0 B", "1023 B", "1.5 KiB", "5 GiB"]


def test_no_two_methods_look_alike():
    """There are more methods than colours, so colour and symbol together tell them apart."""
    colours = method_colours(list(wb.METHODS))
    assert len({(colours[name], method_symbol(name)) for name in wb.METHODS}) == len(wb.METHODS)


def test_report_is_one_offline_file(comparison, tmp_path):
    path = comparison.report(tmp_path / "sub" / "report.html")
    page = path.read_text()
    body = page[page.index("</script>") :]  # Plotly's own source names addresses it does not fetch
    assert "https://" not in body and "<link" not in body and 'src="http' not in body
    for row in comparison.rows:
        assert row.setup in body and row.fired in body
    assert body.count('class="plotly-graph-div"') == 3 + 2  # two trade-offs, bytes over time, two maps
    assert "Remember:" in body or "Rememb" in body  # the tokens as text
    assert [entry.name for entry in path.parent.iterdir()] == ["report.html"]


def test_report_that_cannot_be_written(comparison, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(wb.UserError, match="Cannot write the report"):
        comparison.report(tmp_path / "file" / "report.html")


def test_markup_in_text_stays_text(comparison):
    assert (
        "<script>alert"
        not in wb.Comparison(
            {**comparison.about, "model": "<script>alert(1)</script>"}, comparison.rows, comparison.traces
        )._repr_html_()
    )
