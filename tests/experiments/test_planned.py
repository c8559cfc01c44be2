"""A method's plan is what a recording of the same sizes says, for every registered method that a plan can foresee."""

from __future__ import annotations

import pytest

import workbench as wb
from workbench.cost.plan import Plan
from workbench.cost.under_method import under
from workbench.engine.policy import CASCADE
from workbench.experiments.planned import planned
from workbench.methods.base import parse_method
from workbench.testing import random_llama

CONTEXT, STEPS = 60, 9
KNOBS = {"lazy-eviction": ",window=4", "quest": ",page=4", "snapkv": ",window=8", "duo-attention": ",sinks=2,recent=4"}
EVICTING = [name for name, cls in wb.METHODS.items() if cls.slot == "cache" and name != "dense"]


@pytest.fixture(scope="module")
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(), tiny.tokenizer))


def counts(trace: wb.Trace) -> dict[str, object]:
    """What a prediction is made of, by step."""
    attention, cache = trace.table("attention"), trace.table("cache")
    scored, moved = cache[cache["op"] == "score"], cache[cache["op"] != "score"]
    return {
        "read": attention.groupby("step")["kv_read"].sum().tolist(),
        "held": attention.groupby("step")["kv_held"].sum().tolist(),
        "flops": scored[scored["extra_flops"] > 0].groupby("step")["extra_flops"].sum().to_dict(),
        "scoring bytes": scored[scored["extra_bytes"] > 0].groupby("step")["extra_bytes"].sum().to_dict(),
        "moved bytes": moved[moved["extra_bytes"] > 0].groupby("step")["extra_bytes"].sum().to_dict(),
    }


@pytest.mark.parametrize("name", EVICTING)
@pytest.mark.parametrize("budget", ["0.3", "20"])
def test_a_plan_under_a_method_equals_a_recording(lm, name, budget):
    text = f"{name}:budget={budget}{KNOBS.get(name, '')}"
    try:
        says = planned(text)
    except wb.UserError as refusal:
        assert name in str(refusal) and str(refusal).endswith("run it live.")
        return
    session = wb.Session(lm, parse_method(text))
    session.prefill([1 + number * 7 % 90 for number in range(CONTEXT)])
    session.generate(STEPS + 1, stop_at_end=False)
    trace, _ = Plan(lm.anatomy, batch=1, context=CONTEXT, new_tokens=STEPS).trace()
    seen = trace.table("steps")["context"].tolist()[1:]
    foreseen = counts(under(trace, says(lm.anatomy, CONTEXT, seen)))
    recorded = counts(session.trace.select(steps=range(STEPS + 1)))
    method = parse_method(text)
    if method.selects and method.page_limits(CONTEXT, CONTEXT)[0] < method.page_limits(CONTEXT, CONTEXT)[1]:
        most = foreseen.pop("read")
        assert all(at_most >= read for at_most, read in zip(most, recorded.pop("read"), strict=True))
    if method.joint == CASCADE:  # earlier layers decide again in the prefill
        again = ("scoring bytes", "moved bytes")
        assert all(foreseen[name].pop(0) <= recorded[name].pop(0) for name in again)
    assert foreseen == recorded


def test_what_cannot_be_planned_is_said(lm):
    for text, why in (("oracle", "rehearses"), ("fastkv", "later layers"), ("uncomp", "calibrated"), ("dense", "no budget")):
        with pytest.raises(wb.UserError, match=why):
            planned(text)


def test_a_million_tokens_are_planned_without_memory(lm):
    costs = planned("snapkv:budget=0.1")(lm.anatomy, 10**6, [10**6 + 1])
    assert {each.kv_read for each in costs.values()} == {(10**6, 10**5 + 1)}
    # 2 Hq W N D FLOPs: 4 query heads, a window of 32, a million keys of 8
    assert {each.scoring_flops for each in costs.values()} == {(2 * 4 * 32 * 10**6 * 8, 0)}
