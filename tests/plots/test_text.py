"""Texts that come from elsewhere are shown and nothing else, in every figure."""

from __future__ import annotations

import dataclasses
import html
import re

import pandas as pd
import pyarrow as pa
import pytest

import workbench as wb
from workbench.cost.crossover import crossover
from workbench.experiments.planned import planned
from workbench.live import LiveRun
from workbench.plots.text import LONGEST_LABEL, LONGEST_TOKEN, plain, quoted
from workbench.trace.trace import Trace

MARKUP = '<b>bold</b><a href="https://example.org">&amp;</a><script>alert(1)</script>'
HOSTILE = MARKUP + "$x$ %{x} \x1b[31m\u202e"
SHOWN = MARKUP + r"$x$ %{x} \x1b[31m\u202e"
OURS = re.compile(r"<br>|</?sub>|<extra></extra>")
ENTITY = re.compile(r"&#\d+;")


def test_a_text_is_shown_as_it_is():
    assert html.unescape(plain(HOSTILE)) == SHOWN
    assert not re.search(r"[<>$\x1b\u202e]|%\{", plain(HOSTILE))
    assert plain("h2o(budget=0.2), 50% & so on") == "h2o(budget=0.2), 50% &#38; so on"


def test_a_token_shows_its_blanks_and_ends_where_it_is_long():
    assert quoted(" the\n") == r"' the\n'" and quoted(None) == "''"
    assert html.unescape(quoted(HOSTILE[-6:])) == repr(HOSTILE[-6:])
    assert len(quoted("a" * 10**6)) == LONGEST_TOKEN + 2 and len(plain("a" * 10**6)) == LONGEST_LABEL


def with_texts(trace: Trace) -> Trace:
    """The same trace, as somebody may have made it."""
    tables = {name: trace.arrow(name) for name in trace._tables}
    tokens = tables["tokens"]
    texts = pa.array([HOSTILE] * tokens.num_rows)
    tables["tokens"] = tokens.set_column(tokens.column_names.index("text"), "text", texts)
    return Trace({**trace.meta, "setup": HOSTILE}, tables)


@pytest.fixture(scope="module")
def figures(tiny):
    """Every function of `wb.plots` that draws, on values whose texts are hostile."""
    moe = wb.load("tiny-moe")
    run = LiveRun(moe, wb.H2O(budget=0.5), follow=True)
    run.read("The statement is executed.")
    run.advance()
    run.swap(wb.StreamingLLM(budget=8))
    run.advance()
    snapshot = run.snapshot()
    history = snapshot.history.assign(setup=HOSTILE)
    texts, swaps = (HOSTILE,) * len(snapshot.texts), ((2, HOSTILE),)
    snapshot = dataclasses.replace(snapshot, name=HOSTILE, setup=HOSTILE, texts=texts, history=history, swaps=swaps)
    session = wb.Session(moe, wb.H2O(budget=8), importance="full", routing="logits")
    session.prefill("The statement is executed.")
    session.step()
    trace = with_texts(session.trace)
    compared = wb.compare(tiny, wb.workloads.recall(context=96, samples=1, facts=1), ["h2o:budget=0.5"])
    about = {**compared.about, "model": HOSTILE, "workload": HOSTILE}
    rows = tuple(dataclasses.replace(row, setup=row.setup.replace("h2o(", HOSTILE + "(")) for row in compared.rows)
    comparison = wb.Comparison(about, rows, {HOSTILE: trace})
    recording = wb.record(tiny, "The statement is executed once for every item.", new_tokens=2)
    replay = wb.replay(recording, ["h2o"], [0.5])
    check = wb.check_replay(tiny, recording, replay, points=1)
    check = dataclasses.replace(check, points=tuple(dataclasses.replace(each, setup=HOSTILE) for each in check.points))
    points = tuple(dataclasses.replace(point, method=HOSTILE, setup=HOSTILE) for point in replay.points)
    replay = dataclasses.replace(replay, about={**replay.about, "model": HOSTILE}, points=points)
    prediction = wb.predict(tiny.anatomy, "h100-sxm", dtype="bf16", context=64)
    sheet = dataclasses.replace(prediction.hardware, name=HOSTILE, label=HOSTILE)
    prediction = dataclasses.replace(prediction, model=HOSTILE, hardware=sheet)
    says = planned("h2o:budget=0.5")
    crossed = crossover(tiny.anatomy, sheet, {HOSTILE: says}, dtype="bf16", contexts=[32, 64], new_tokens=2)
    led = pd.DataFrame([{"setup": HOSTILE, "rows": 1, "nll": 1.0, "kl_to_dense": 0.5, "read_bytes": 10, "resident_bytes": 20}])
    p = wb.plots
    return {
        "attention_map": p.attention_map(snapshot),
        "cache_map": p.cache_map(trace),
        "co_activation": p.co_activation(trace),
        "components": p.components(trace),
        "cross_over": p.cross_over(crossed),
        "expert_cache_hits": p.expert_cache_hits(trace),
        "expert_load": p.expert_load(snapshot),
        "held_map": p.held_map(snapshot),
        "importance_map": p.importance_map(trace),
        "kv_bytes": p.kv_bytes({HOSTILE: trace}),
        "live_curve": p.live_curve({HOSTILE: snapshot, "other": snapshot}),
        "pareto": p.pareto(comparison),
        "predicted_time": p.predicted_time(prediction),
        "quality_by_bytes": p.quality_by_bytes(led, title=HOSTILE),
        "replay_curves": p.replay_curves(replay, check),
        "replay_map": p.replay_map(replay, HOSTILE, 0.5, 1, texts=[HOSTILE] * 99),
        "replay_steps": p.replay_steps(replay, HOSTILE, 0.5),
        "roofline": p.roofline(prediction),
        "routing_lanes": p.routing_lanes(trace),
        "router_confidence": p.router_confidence(trace),
        "score_map": p.score_map(comparison),
        "turn_scores": p.turn_scores(comparison),
        "unique_experts": p.unique_experts(trace),
    }


def test_every_function_that_draws_is_tried(figures):
    assert set(figures) == set(wb.plots.__all__) - {"dark", "png"}


def texts_of(part):
    """Every text in a figure."""
    if isinstance(part, dict):
        for key, each in part.items():
            if key not in ("template", "bdata"):
                yield from texts_of(each)
    elif isinstance(part, list | tuple):
        for each in part:
            yield from texts_of(each)
    elif hasattr(part, "tolist"):
        yield from texts_of(part.tolist())
    elif isinstance(part, str):
        yield part


@pytest.mark.parametrize("name", sorted(set(wb.plots.__all__) - {"dark", "png"}))
def test_markup_and_control_characters_stay_text(figures, name):
    texts = list(texts_of(figures[name].to_plotly_json()))
    for text in texts:
        rest = ENTITY.sub("", OURS.sub("", text))
        assert not re.search(r"[<>&$]", rest) and rest.isprintable(), text
    if name != "components":  # which shows nothing but our own names
        assert any("<b>bold</b>" in html.unescape(text) for text in texts)
