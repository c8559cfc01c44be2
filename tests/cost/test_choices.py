"""What tokens next to each other share of their experts, by hand and against a plain recount; the table of a row a layer."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest
import torch

import workbench as wb
from workbench.cost import routing
from workbench.cost.choices import experts_a_token, neighbours
from workbench.testing import ids, random_model, random_qwen_moe


@pytest.fixture(scope="module")
def trace() -> wb.Trace:
    model = random_qwen_moe()
    with wb.profile(model, routing="choices", tokenizer=wb.load("tiny-moe").tokenizer) as prof, torch.no_grad():
        model.generate(ids(9, 2), max_new_tokens=4, min_new_tokens=4, do_sample=False)
    return prof.trace


def test_neighbours_are_windows_of_one_row_over_all_steps(trace):
    table = neighbours(trace)
    choices = trace.table("choices")
    lengths = choices.groupby(["layer", "row"]).size()
    assert sorted(table["tokens"].unique()) == [1, 2, 4, 8] and (lengths == 12).all()
    for row in table.itertuples():
        hit = []
        for _, of_row in choices[choices["layer"] == row.layer].groupby("row"):
            chosen = of_row.sort_values("position")["experts"].tolist()
            hit += [len(set(np.concatenate(chosen[at : at + row.tokens]))) for at in range(len(chosen) - row.tokens + 1)]
        assert row.unique == pytest.approx(np.mean(hit))
        assert row.expected == pytest.approx(6 * (1 - (1 - 2 / 6) ** row.tokens))


def test_neighbours_of_a_number_of_ones_own(trace):
    assert set(neighbours(trace, [3])["tokens"]) == {3} and neighbours(trace, [99]).empty
    with pytest.raises(wb.UserError, match="no windows of 0 tokens"):
        neighbours(trace, [0])


def test_experts_a_token_are_those_really_given(trace):
    assert experts_a_token(trace).tolist() == [2.0] * 3
    session = wb.Session(wb.load("tiny-moe"), wb.TopK(k=1), routing="choices")
    session.prefill([3, 4, 5, 6])
    one = session.trace
    bare = wb.Trace(one.meta, {name: one.arrow(name) for name in one._tables} | {"choices": one.arrow("choices").slice(0, 0)})
    assert experts_a_token(one).tolist() == experts_a_token(bare).tolist() == [1.0] * 4
    assert neighbours(one, [1])["expected"].tolist() == pytest.approx([1.0] * 4)


def test_a_row_a_layer_holds_what_the_single_functions_say(trace):
    table = trace.routing().set_index("layer")
    hit = routing.unique_experts(trace)
    assert table["read_bytes"].to_dict() == hit.groupby("layer")["read_bytes"].sum().to_dict()
    assert (table["read_share"] == hit.groupby("layer")["unique"].mean() / 6).all()
    for part in (routing.balance(trace), routing.reuse(trace), routing.specialisation(trace)):
        for name, column in part.set_index("layer").items():
            assert table[name].to_dict() == pytest.approx(column.to_dict())


def test_what_needs_choices_is_null_without_them(trace):
    tables = {name: trace.arrow(name) for name in trace._tables}
    without = wb.Trace(trace.meta, {**tables, "choices": tables["choices"].slice(0, 0)})
    table = without.routing()
    assert table[["reuse", "by_chance", "information"]].isna().all(axis=None) and list(table) == list(trace.routing())
    assert (table["read_bytes"] == trace.routing()["read_bytes"]).all()
    with pytest.raises(wb.UserError, match='record it with routing="choices"'):
        neighbours(without)


def test_what_tokens_are_is_not_known_without_their_texts(trace):
    tokens = trace.arrow("tokens")
    place = tokens.schema.get_field_index("text")
    nameless = tokens.set_column(place, tokens.schema.field(place), pa.nulls(len(tokens), pa.string()))
    tables = {name: trace.arrow(name) for name in trace._tables}
    table = wb.Trace(trace.meta, {**tables, "tokens": nameless}).routing()
    assert table["information"].isna().all() and (table["reuse"] == trace.routing()["reuse"]).all()


def test_a_model_without_experts_is_one_sentence():
    dense = random_model("llama")
    with wb.profile(dense, routing="choices") as prof, torch.no_grad():
        dense(ids(4))
    with pytest.raises(wb.UserError, match="has no experts"):
        neighbours(prof.trace)
    with pytest.raises(wb.UserError, match="No expert was called"):
        prof.trace.routing()
