"""Quality beside the FFN weights read, with one row in flight or several."""

from __future__ import annotations

import pytest

import workbench as wb
from workbench.cost.ffn import read_bytes, resident_bytes
from workbench.errors import UserError
from workbench.experiments.in_flight import quality_in_flight
from workbench.plots import quality_by_bytes

SIZES = {"context": 24, "tokens": 4, "texts": 4}


@pytest.fixture(scope="module")
def moe():
    return wb.load("tiny-moe")


@pytest.fixture(scope="module")
def found(moe):
    return quality_in_flight(moe, ["top-k:k=1", "top-k:k=2", "snapkv:budget=8,window=4 + top-k:k=1"], (1, 4), **SIZES)


def test_fewer_experts_read_less_and_rows_share_what_is_read(found):
    read = found.pivot(index="setup", columns="rows", values="read_bytes")
    assert (read[4] < read[1]).all(), "rows in flight share experts"
    assert read.loc["top-k", 1] == read.loc["dense", 1] / 2, "one expert a token in place of two"
    kl = found.pivot(index="setup", columns="rows", values="kl_to_dense")
    assert (kl.loc[["dense", "top-k(k=2)"]] == 0).all(axis=None) and (kl.loc["top-k"] > 0).all()
    changed = found.set_index(["setup", "rows"])["changed"]
    assert changed["top-k", 1] == changed["top-k", 4] == 1 and changed["dense", 1] == changed["top-k(k=2)", 4] == 0


def test_rows_in_flight_change_no_prediction(found):
    nll = found.pivot(index="setup", columns="rows", values="nll")
    assert nll[1].tolist() == pytest.approx(nll[4].tolist(), abs=1e-4)


def test_read_bytes_are_those_of_the_experts_hit(moe):
    session = wb.Session(moe, routing="choices")
    session.prefill("The keeper of the lighthouse counts the ships.")
    session.generate(3)
    trace, a_expert = session.trace, 4 * 3 * 128 * 144
    hit = trace.table("choices").explode("experts").groupby(["step", "layer"])["experts"].nunique() * a_expert
    read = read_bytes(trace).set_index(["step", "layer"])["read_bytes"]
    assert read.to_dict() == hit.to_dict()
    assert resident_bytes(moe.anatomy) == 4 * 8 * a_expert


def test_a_dense_models_ffn_is_read_whole_every_step():
    session = wb.Session(wb.load("tiny-dense"))
    session.prefill("some text")
    session.generate(2)
    assert read_bytes(session.trace)["read_bytes"].tolist() == [4 * 3 * 128 * 352] * 4 * 3


def test_the_figure_has_a_panel_for_each_number_of_rows(found):
    figure = quality_by_bytes(found, title="<b>a model</b>")
    assert len(figure.data) == 2 * found["setup"].str.split("(").str[0].nunique()
    assert "<b>" not in figure.layout.title.text.replace("<br>", "")
    with pytest.raises(UserError, match="as quality"):
        quality_by_bytes(found, "read_bytes")
    with pytest.raises(UserError, match="nothing to draw"):
        quality_by_bytes(found.head(0))


def test_what_is_wrong_is_one_sentence(moe):
    with pytest.raises(UserError, match="cannot be run 3 at a time"):
        quality_in_flight(moe, [], (3,), **SIZES)
    with pytest.raises(UserError, match="more than the 8"):
        quality_in_flight(moe, ["top-k:k=99"], (1,), **SIZES)
