"""Which bit plane is loaded next: worked examples, bounds, and the order over a recorded run."""

from __future__ import annotations

import random
from statistics import mean

import pytest

import workbench as wb
from workbench.cost.load_order import Plane, by_number, hottest_first, load_orders, timeline


def drawn(seed: int) -> list[Plane]:
    """Eight experts, some of them not asked for; of an expert fewer tokens ask for more bits."""
    draw = random.Random(seed)
    planes = []
    for expert in range(8):
        counts = sorted((draw.choice((0, 0, 1, 2, 5, 12, 30)) for _ in range(3)), reverse=True)
        planes += [
            Plane(expert, bits, tokens, 200 if bits == 2 else 100)
            for bits, tokens in zip((2, 3, 4), counts, strict=True)
            if tokens
        ]
    draw.shuffle(planes)
    return planes


def test_the_head_of_most_tokens_is_loaded_next():
    planes = [Plane(0, 2, 3, 1), Plane(0, 3, 1, 1), Plane(1, 2, 9, 1), Plane(1, 3, 2, 1), Plane(2, 2, 3, 1), Plane(2, 3, 3, 1)]
    assert [(plane.expert, plane.bits) for plane in hottest_first(planes[::-1])] == [
        (1, 2),
        (0, 2),
        (2, 2),
        (2, 3),
        (1, 3),
        (0, 3),
    ]
    assert by_number(planes[::-1]) == planes


def test_computing_waits_for_loading_by_hand():
    # loads end at 2, 3, 4; computing 0-2 waits, 2-3, waits none, 3-8, 8-9: makespan 9, idle 2
    order = [Plane(0, 2, 1, 20), Plane(1, 2, 5, 10), Plane(1, 3, 1, 10)]
    found = timeline(order, bytes_per_s=10, token_s=1)
    assert (found.makespan_s, found.idle_s, found.load_s, found.compute_s) == (9, 2, 4, 7)
    # the second first: computed 1-6, the first is there at 3 and done at 7; its plane of 3 bits is there at 4
    assert timeline([order[1], order[0], order[2]], 10, 1).makespan_s == 8


@pytest.mark.parametrize("token_s", [0.1, 0.5, 1.0])
def test_the_hottest_first_wait_less_and_no_order_beats_its_bounds(token_s):
    spans: dict[str, list[float]] = {"hot": [], "number": []}
    for seed in range(60):
        planes = drawn(seed)
        if not planes:
            continue
        for name, order in (("hot", hottest_first(planes)), ("number", by_number(planes))):
            assert sorted(order, key=hash) == sorted(planes, key=hash)
            for expert in {plane.expert for plane in order}:
                bits = [plane.bits for plane in order if plane.expert == expert]
                assert bits == sorted(bits)
            found = timeline(order, 100.0, token_s)
            assert found.makespan_s >= max(found.load_s, found.compute_s) - 1e-9
            assert found.makespan_s == pytest.approx(found.compute_s + found.idle_s)
            spans[name].append(found.makespan_s)
    assert mean(spans["hot"]) < mean(spans["number"])


def test_a_recorded_run_is_loaded_faster_hottest_first():
    lm = wb.load("tiny-moe")
    session = wb.Session(lm, wb.D2MoE(bits=2.5))
    session.prefill("The statement is executed repeatedly until the iterator is exhausted. " * 4)
    session.step()
    found = load_orders(session.trace, bytes_per_s=1e9, flops_per_s=1e11)
    assert len(found) == 2 * 4 * 2 and set(found["phase"]) == {"prefill", "decode"}
    prefill = found[found["phase"] == "prefill"].groupby("order")[["makespan_s", "load_s", "compute_s"]].sum()
    assert prefill.loc["hottest first", "makespan_s"] < prefill.loc["by number", "makespan_s"]
    assert prefill["load_s"].nunique() == 1
    planes = session.trace.table("planes")
    assert found.groupby("order")["load_s"].sum()["by number"] == pytest.approx(planes["plane_bytes"].sum() / 1e9)
    with pytest.raises(wb.UserError, match="above 0"):
        load_orders(session.trace, 0, 1)
    dense = wb.Session(lm)
    dense.prefill("some text")
    with pytest.raises(wb.UserError, match="No bit planes"):
        load_orders(dense.trace, 1, 1)
