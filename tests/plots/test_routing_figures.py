"""Figures of expert routing draw what the trace says, for a few tokens and for many, and say what they lack."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

import workbench as wb
from workbench.cost import routing
from workbench.cost.choices import neighbours
from workbench.plots.co_activation import MOST
from workbench.plots.matrix import MAX_COLUMNS
from workbench.plots.theme import PALETTE
from workbench.testing import ids, random_model

TEXT = "The statement is executed once."


@pytest.fixture(scope="module")
def trace() -> wb.Trace:
    session = wb.Session(wb.load("tiny-moe"), routing="logits")
    session.prefill([TEXT, "A name"])
    session.generate(4, stop_at_end=False)
    return session.trace


@pytest.fixture(scope="module")
def dense() -> wb.Trace:
    model = random_model("llama")
    with wb.profile(model, routing="logits") as prof, torch.no_grad():
        model(ids(4))
    return prof.trace


def with_table(trace: wb.Trace, name: str, table: pa.Table) -> wb.Trace:
    return wb.Trace(trace.meta, {each: table if each == name else trace.arrow(each) for each in trace._tables})


def without_choices(trace: wb.Trace) -> wb.Trace:
    return with_table(trace, "choices", trace.arrow("choices").slice(0, 0))


def test_lanes_show_the_expert_with_the_largest_weight(trace):
    figure = wb.plots.routing_lanes(trace)
    drawn = figure.data[0]
    choices = trace.table("choices").query("row == 0")
    assert drawn.z.shape == (4, choices["position"].nunique())
    for row in choices.itertuples():
        best = row.experts[np.argmax(row.weights)]
        assert drawn.z[row.layer, row.position] == best
        assert drawn.customdata[row.layer][row.position].startswith(f"expert {best}: {max(row.weights):.2f}, expert ")
    assert "statement" in drawn.x[3] and drawn.x[3].startswith("3 ") and "%{z}" in drawn.texttemplate
    assert [mark.text for mark in figure.layout.annotations] == ["decode"]
    prompt = trace.table("tokens").query("row == 0 and phase == 'prefill'")
    assert figure.layout.shapes[0].x0 == len(prompt) - 0.5


def test_an_expert_has_the_same_colour_in_every_lane(trace):
    drawn = wb.plots.routing_lanes(trace).data[0]
    assert (drawn.zmin, drawn.zmax) == (-0.5, 7.5)
    steps = [(place * 8, colour) for place, colour in drawn.colorscale]
    assert steps == [(at, PALETTE[expert]) for expert in range(8) for at in (expert, expert + 1)]


def test_lanes_of_many_experts_and_of_tokens_without_texts_say_so():
    model = random_model("deepseek_v3", n_routed_experts=32)
    with wb.profile(model, routing="choices") as prof, torch.no_grad():
        model(ids(4))
    figure = wb.plots.routing_lanes(prof.trace)
    drawn = figure.data[0]
    assert list(drawn.x) == ["0", "1", "2", "3"] and list(figure.layout.yaxis.ticktext) == [
        "1",
        "2",
    ]  # the first layer is dense
    assert f"experts {len(PALETTE)} apart share one" in figure.layout.title.text and not drawn.showscale
    assert drawn.colorscale[2 * len(PALETTE)][1] == drawn.colorscale[0][1]


def test_lanes_of_a_part_and_of_another_row(trace):
    part = wb.plots.routing_lanes(trace, positions=range(2, 5)).data[0]
    assert (part.z == wb.plots.routing_lanes(trace).data[0].z[:, 2:5]).all() and part.x[0].startswith("2 ")
    assert wb.plots.routing_lanes(trace, row=1).data[0].z.shape != wb.plots.routing_lanes(trace).data[0].z.shape
    with pytest.raises(wb.UserError, match="No token of row 2 was routed; choose one of 0, 1"):
        wb.plots.routing_lanes(trace, row=2)
    with pytest.raises(wb.UserError, match="No token at"):
        wb.plots.routing_lanes(trace, positions=range(500, 600))


def test_lanes_of_a_long_text_show_what_most_tokens_of_a_column_went_to(trace):
    """Three tokens a column: two went to expert 1, the third was dropped or went to expert 2."""
    count = 3 * MAX_COLUMNS - 1
    experts = [[1, 0] if number % 3 else [-1, -1] if number % 2 else [2, 0] for number in range(count)]
    columns = {"step": 0, "layer": 1, "row": 0, "position": range(count), "experts": experts}
    columns |= {"weights": [[0.7, 0.3]] * count, "logits": None}
    rows = {name: list(each) if isinstance(each, range | list) else [each] * count for name, each in columns.items()}
    figure = wb.plots.routing_lanes(with_table(trace, "choices", pa.table(rows, schema=trace.arrow("choices").schema)))
    drawn = figure.data[0]
    assert drawn.z.shape == (1, MAX_COLUMNS) and (drawn.z == 1).all() and "3 tokens share a column" in figure.layout.title.text
    assert drawn.customdata[0][:2] == ["expert 1, for 2 of 3 tokens", "expert 1, for 2 of 2 tokens"]
    assert drawn.texttemplate is None and list(figure.layout.yaxis.ticktext) == ["1"]


def test_a_dropped_token_has_no_colour(trace):
    table = trace.arrow("choices").to_pylist()
    table[0]["experts"] = [-1, -1]
    changed = with_table(trace, "choices", pa.Table.from_pylist(table, schema=trace.arrow("choices").schema))
    drawn = wb.plots.routing_lanes(changed, row=table[0]["row"]).data[0]
    assert np.isnan(drawn.z[0, 0]) and drawn.customdata[0][0] == "dropped"


def test_pairs_of_a_layer(trace):
    drawn = wb.plots.co_activation(trace, 2).data[0]
    counts = routing.co_activation(trace, 2)
    given = counts.diagonal()
    for one in range(8):
        for other in range(8):
            if one == other or not given[one]:
                assert np.isnan(drawn.z[one, other])
            else:
                assert drawn.z[one, other] == counts[one, other] / given[one]
                assert drawn.customdata[one, other].tolist() == [counts[one, other], given[one]]
    first = wb.plots.co_activation(trace)
    assert "layer 0" in first.layout.title.text and "14.3%" in first.layout.title.text  # one more of seven
    with pytest.raises(wb.UserError, match="Layer 9 has no experts; those that have are 0, 1, 2, 3"):
        wb.plots.co_activation(trace, 9)


def test_pairs_of_many_experts_are_the_busiest_ones(trace):
    meta = {**trace.meta, "anatomy": {**trace.meta["anatomy"]}}
    layers = [{**layer, "experts": {**layer["experts"], "num_experts": 400}} for layer in meta["anatomy"]["layers"]]
    meta["anatomy"]["layers"] = layers
    figure = wb.plots.co_activation(wb.Trace(meta, {name: trace.arrow(name) for name in trace._tables}), 1)
    assert figure.data[0].z.shape == (MOST, MOST) and f"the {MOST} busiest of 400" in figure.layout.title.text
    assert set(map(str, np.flatnonzero(routing.co_activation(trace, 1).diagonal()))) <= set(figure.data[0].x)


def test_experts_hit_are_those_of_the_steps_and_of_neighbours_beside_the_expectation(trace):
    lines = {line.name: line for line in wb.plots.unique_experts(trace).data}
    hit = routing.unique_experts(trace)
    for phase in ("prefill", "decode"):
        drawn, ran = lines[f"{phase}, as it ran"], hit[hit["phase"] == phase]
        assert drawn.x[0] == ran["tokens"].iloc[0] and drawn.y[0] == pytest.approx(ran["unique"].mean())
    expected = lines["independent, even choices"]
    assert np.allclose(expected.y, 8 * (1 - 0.75 ** np.array(expected.x)))
    beside = neighbours(trace).groupby("tokens")["unique"].mean()
    assert (
        dict(zip(lines["tokens next to each other"].x, lines["tokens next to each other"].y, strict=True)) == beside.to_dict()
    )
    one = {line.name: line for line in wb.plots.unique_experts(without_choices(trace), 2).data}
    assert "tokens next to each other" not in one
    assert one["decode, as it ran"].y[0] == pytest.approx(hit.query("layer == 2 and phase == 'decode'")["unique"].mean())
    with pytest.raises(wb.UserError, match="No expert of layer 4 was called; there are layers 0, 1, 2, 3"):
        wb.plots.unique_experts(trace, 4)


def test_a_cache_of_experts_by_slots_and_policy(trace):
    figure = wb.plots.expert_cache_hits(trace, phase="decode")
    found = routing.expert_cache(trace, range(1, 9), phase="decode")
    assert len(figure.data) == 3
    for line, policy in zip(figure.data, ("lru", "lfu", "belady"), strict=True):
        of_policy = found[found["policy"] == policy]
        assert list(line.x) == list(range(1, 9)) and list(line.y) == of_policy["hit_rate"].tolist()
    assert list(wb.plots.expert_cache_hits(trace, [2]).data[0].x) == [2]
    with pytest.raises(wb.UserError, match="0 slots holds nothing"):
        wb.plots.expert_cache_hits(trace, [0, 1])
    with pytest.raises(wb.UserError, match="no number of slots"):
        wb.plots.expert_cache_hits(trace, [])


@pytest.mark.parametrize("of", ["top_weight", "margin", "entropy"])
def test_boxes_of_confidence_are_quartiles_over_tokens(trace, of):
    (box,) = wb.plots.router_confidence(trace, of).data
    values = routing.confidence(trace).groupby("layer")[of]
    for name, share in (("lowerfence", 0.05), ("q1", 0.25), ("median", 0.5), ("q3", 0.75), ("upperfence", 0.95)):
        assert np.allclose(box[name], values.quantile(share))


def test_a_figure_that_lacks_its_data_says_how_to_record_it(trace, dense):
    p = wb.plots
    for draw in (p.expert_load, p.routing_lanes, p.co_activation):
        with pytest.raises(wb.UserError, match=r"has no experts; .* such as tiny-moe"):
            draw(dense)
    for draw in (p.unique_experts, p.expert_cache_hits):
        with pytest.raises(wb.UserError, match="No expert was called"):
            draw(dense)
    for draw in (p.routing_lanes, p.co_activation, p.router_confidence):
        with pytest.raises(wb.UserError, match='record it with routing="choices"'):
            draw(without_choices(trace))
    places = trace.arrow("choices")
    plain = places.set_column(6, places.schema.field(6), pa.nulls(len(places), places.schema.types[6]))
    with pytest.raises(wb.UserError, match='record it with routing="logits"'):
        p.router_confidence(with_table(trace, "choices", plain), "margin")
    with pytest.raises(wb.UserError, match="Cannot draw 'colour'"):
        p.router_confidence(trace, "colour")


def test_a_part_without_any_step_is_one_sentence(trace):
    nothing = trace.select(steps=range(0))
    for draw in (wb.plots.unique_experts, wb.plots.expert_cache_hits):
        with pytest.raises(wb.UserError, match="No expert was called"):
            draw(nothing)
    with pytest.raises(wb.UserError, match="no choices by token"):
        wb.plots.routing_lanes(nothing)
    assert "No token was routed" in wb.plots.expert_load(nothing).layout.annotations[0].text


def test_a_dark_copy_keeps_the_lanes_apart(trace):
    light, dark = wb.plots.routing_lanes(trace), wb.plots.dark(wb.plots.routing_lanes(trace))
    assert (light.data[0].z == dark.data[0].z).all()
    colours = [colour for _, colour in dark.data[0].colorscale]
    assert len(set(colours)) == 8 and not set(colours) & {colour for _, colour in light.data[0].colorscale}
