"""Figures of what would be: shares add up, a method's line is its seconds over the dense run's, and names stay text."""

from __future__ import annotations

from dataclasses import replace

import pytest

import workbench as wb
from workbench.cost.crossover import crossover
from workbench.experiments.planned import planned
from workbench.models.anatomy import anatomy_of
from workbench.plots.theme import human_seconds
from workbench.testing import random_qwen_moe

HTML = "<b onclick=alert(1)>"


def test_predicted_time_is_all_of_each_step():
    prediction = wb.predict(anatomy_of(random_qwen_moe()), "h100-sxm", context=64, new_tokens=8)
    figure = wb.plots.predicted_time(replace(prediction, model=HTML))
    assert {bar.name for bar in figure.data} == set(prediction.table["component"])
    for place, phase in enumerate(prediction.phases["phase"]):
        assert sum(bar.x[place] for bar in figure.data) == pytest.approx(1)
        assert figure.data[0].y[place].startswith(f"{phase}: ")
    of_mlp = prediction.table.set_index(["phase", "component"]).loc[("decode", "experts"), "predicted_s"]
    (experts,) = [bar for bar in figure.data if bar.name == "experts"]
    assert experts.customdata[1][0] == human_seconds(of_mlp / 8)
    assert HTML not in figure.to_json() and HTML.encode("unicode-escape").decode() not in figure.to_json()


def test_a_line_of_the_cross_over_is_the_seconds_over_those_of_dense():
    methods = {"snapkv:budget=0.2": planned("snapkv:budget=0.2"), "h2o:budget=0.5": planned("h2o:budget=0.5")}
    found = crossover(anatomy_of(random_qwen_moe()), "h100-sxm", methods, contexts=[64, 4096], new_tokens=8)
    rows = found.table.set_index(["method", "context"])["step_s"]
    lines = {line.name: line for line in wb.plots.cross_over(found, "step_s").data}
    assert set(lines) == {"dense", *methods}
    for label in methods:
        assert list(lines[label].x) == [64, 4096]
        assert lines[label].y[1] == pytest.approx(rows[label, 4096] / rows["dense", 4096])
    assert lines["h2o:budget=0.5"].line.color != lines["snapkv:budget=0.2"].line.color
    assert set(lines["dense"].y) == {1}
    with pytest.raises(wb.UserError, match="Cannot draw 'score'"):
        wb.plots.cross_over(found, "score")
