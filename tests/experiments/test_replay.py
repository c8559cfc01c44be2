"""A replay keeps what a live run keeps, and its numbers are those of attention computed anew over what was kept."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

import workbench as wb
import workbench.experiments.replay as replaying
from workbench.engine.policy import ROTATION, THINNING
from workbench.methods import METHODS
from workbench.testing import calibrate_all, ids, random_llama, random_model

PROMPT, NEW = 40, 10
CACHE = [cls for cls in METHODS.values() if cls.slot == "cache" and cls.name != "dense"]
LIVE_ONLY = {"dapq", "lookahead-kv"}
"""Methods that rehearse tokens no recording holds, unless told otherwise."""
REPLAYING = [cls for cls in CACHE if not cls.merges and not cls.selects]
EVICTING = [cls for cls in REPLAYING if not {ROTATION, THINNING} & cls().needs and cls.name not in LIVE_ONLY]


def small(cls, budget=0.5):
    """The method with knobs that fit prompts of a few dozen tokens."""
    fitting = {"window": 2 if cls.name == "lazy-eviction" else 8, "mode": "pseudo", "horizon": NEW}
    return cls(budget=budget, **{name: value for name, value in fitting.items() if name in cls.__dataclass_fields__})


@pytest.fixture(scope="module", params=[1, 2], ids=["MQA", "GQA"])
def lm(request, tiny) -> wb.LM:
    return calibrate_all(wb.load((random_llama(request.param), tiny.tokenizer)))


@pytest.fixture(scope="module")
def recording(lm) -> wb.Recording:
    return wb.record(lm, ids(PROMPT), new_tokens=NEW)


@pytest.mark.parametrize("budget", [0.3, 0.9, PROMPT - 1])
@pytest.mark.parametrize("cls", EVICTING, ids=lambda cls: cls.name)
def test_kept_sets_and_bytes_are_those_of_a_live_run(lm, recording, cls, budget):
    """In every layer when the first token is decoded, and in layer 0 at every step: see `Replay`."""
    method = small(cls, budget)
    replay = wb.replay(recording, [method], [budget])
    session = wb.Session(lm, method)
    session.prefill(ids(PROMPT))
    tokens = recording.trace.table("tokens")["id"].tolist()[PROMPT:]
    for step, token in enumerate(tokens):
        for layer in range(lm.anatomy.num_layers if step == 0 else 1):
            held = session._cache.layers[layer].store.positions[0].tolist()
            expected = [sorted({*head, PROMPT + step} - {-1}) for head in held]
            assert [head.tolist() for head in replay.kept(method.label, budget, layer, step)] == expected
        session.step([token])
    live = session.trace.select(phase="decode").table("cache").query("op == 'append' and layer == 0")["held_tokens"]
    assert replay.points[0].held_bytes[0].tolist() == (live * 2 * 8 * 4).tolist()


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("name", ["snapkv:window=8", "h2o"])
def test_mass_and_error_are_those_of_attention_over_what_is_kept(tiny, family, name):
    lm = wb.load((random_model(family), tiny.tokenizer))
    recording = wb.record(lm, ids(PROMPT), new_tokens=NEW)
    replay = wb.replay(recording, [name], [0.3])
    (point,) = replay.points
    for number, layer in enumerate(recording.layers):
        group = layer.queries.shape[0] // layer.keys.shape[0]
        for head, step in itertools.product(range(layer.queries.shape[0]), range(NEW)):
            position, kv_head = PROMPT + step, head // group
            scores = layer.keys[kv_head, : position + 1] @ layer.queries[head, position] * layer.scaling
            if layer.softcap is not None:
                scores = layer.softcap * torch.tanh(scores / layer.softcap)
            sink = torch.zeros(0) if layer.sinks is None else layer.sinks[head : head + 1]
            dense = torch.cat([scores, sink]).softmax(0)[: position + 1]
            kept = torch.tensor(replay.kept(point.method, 0.3, layer.layer, step)[kv_head])
            alone = torch.cat([scores[kept], sink]).softmax(0)[: len(kept)]
            values = layer.values[kv_head, : position + 1]
            full, out = dense @ values, alone @ values[kept]
            retained = float(dense[kept].sum() / dense.sum())
            assert point.mass_retained[number, head, step] == pytest.approx(retained, abs=1e-5)
            assert point.output_error[number, head, step] == pytest.approx(float((out - full).norm() / full.norm()), abs=1e-4)


def test_the_whole_prompt_is_dense(recording):
    curves = wb.replay(recording, [small(cls) for cls in EVICTING], [1000]).curves()
    assert np.allclose(curves["mass_retained"], 1, atol=1e-6) and np.allclose(curves["output_error"], 0, atol=1e-5)
    assert np.allclose(curves["oracle_mass"], 1, atol=1e-6)


def test_no_method_passes_the_oracle(recording):
    curves = wb.replay(recording, [small(cls) for cls in EVICTING], [1, 5, 0.2, 0.5, 0.8]).curves()
    assert len(curves) == 5 * len(EVICTING)
    assert (curves["mass_retained"] <= curves["oracle_mass"] + 1e-6).all()
    assert (curves["oracle_mass"] < 1).all() and (curves["mass_retained"] > 0).all()


def test_the_oracle_is_the_best_of_all_sets(lm):
    recording = wb.record(lm, ids(8), new_tokens=3, layers=[1])
    (point,) = wb.replay(recording, ["snapkv:window=1"], [3]).points
    layer = recording.layers[0]
    num_heads, group = layer.keys.shape[0], layer.queries.shape[0] // layer.keys.shape[0]
    weights = torch.zeros(num_heads, group, 3, 11)
    for head, step in itertools.product(range(num_heads * group), range(3)):
        scores = layer.keys[head // group, : 9 + step] @ layer.queries[head, 8 + step] * layer.scaling
        weights[head // group, head % group, step, : 9 + step] = scores.softmax(0)
    for head in range(num_heads):
        best = max(weights[head][..., [*chosen, 8, 9, 10]].sum(-1).mean() for chosen in itertools.combinations(range(8), 3))
        assert point.oracle_mass[0, head].mean() == pytest.approx(float(best), abs=1e-6)


def test_the_oracle_of_methods_that_decide_at_every_step_takes_the_top_tokens_of_each(recording):
    replay = wb.replay(recording, ["h2o"], [5])
    layer = recording.layers[0]
    group = layer.queries.shape[0] // layer.keys.shape[0]
    scores = layer.queries[:group, PROMPT] @ layer.keys[0, : PROMPT + 1].T * layer.scaling
    # At the first step, the 5 tokens held and the new one are attended.
    best = scores.softmax(-1).mean(0).topk(6).values.sum()
    assert replay.points[0].oracle_mass[0, 0, 0] == pytest.approx(float(best), abs=1e-6)


def test_the_table_adds_up_to_the_curves(recording):
    replay = wb.replay(recording, ["h2o", "snapkv:window=8"], [0.3])
    for row in replay.curves().itertuples():
        table = replay.table(row.method, 0.3)
        assert table["mass_retained"].mean() == pytest.approx(row.mass_retained)
        assert table["oracle_mass"].mean() == pytest.approx(row.oracle_mass)
        once_a_kv_head = table[table["head"] % recording.trace.anatomy.layers[0].attention.group == 0]
        assert once_a_kv_head.query(f"step == {NEW - 1}")["bytes"].sum() == row.bytes
        kept = table.query("layer == 1 and head == 0 and step == 2")["kept"].item()
        assert kept == len(replay.kept(row.method, 0.3, 1, 2)[0])


@pytest.mark.parametrize("cls", EVICTING, ids=lambda cls: cls.name)
def test_budgets_replayed_together_are_those_replayed_alone(recording, cls):
    budgets = [0.2, 7, 0.6, 1000]
    together = wb.replay(recording, [small(cls)], budgets)
    for budget, point in zip(budgets, together.points, strict=True):
        (alone,) = wb.replay(recording, [small(cls)], [budget]).points
        assert np.array_equal(point.gone, alone.gone) and np.array_equal(point.held_bytes, alone.held_bytes)


def test_layers_side_by_side_give_what_they_give_one_after_another(recording):
    methods = [small(cls) for cls in EVICTING]
    alone = wb.replay(recording, methods, [0.3]).curves()
    recording.derived.clear()
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = wb.replay(recording, methods, [0.3]).curves()
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)
    assert together.equals(alone)


def test_what_a_replay_worked_out_stays_with_the_recording_if_there_is_room(lm, monkeypatch):
    recording = wb.record(lm, ids(PROMPT), new_tokens=NEW)
    monkeypatch.setattr(replaying, "KEPT_BYTES", 0)
    first = wb.replay(recording, ["h2o", "snapkv"], [0.3]).curves()
    assert not recording.derived
    monkeypatch.undo()
    again = [wb.replay(recording, ["h2o", "snapkv"], [0.3]).curves() for _ in range(2)]
    assert set(recording.derived) == {layer.layer for layer in recording.layers}
    assert all(curves.equals(first) for curves in again)


def test_one_token_is_not_the_whole_prompt(recording):
    replay = wb.replay(recording, ["h2o"], [1, 1.0, 1])
    assert [len(replay.kept("h2o", budget, 0, 0)[0]) for budget in (1, 1.0)] == [2, PROMPT + 1]
    assert len(replay.points) == 2


def test_a_recording_is_not_changed(recording):
    before = [tensor.clone() for layer in recording.layers for tensor in layer.tensors().values()]
    wb.replay(recording, [small(cls) for cls in EVICTING], [0.3, PROMPT - 1])
    after = [tensor for layer in recording.layers for tensor in layer.tensors().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_saved_recording_replays_the_same(recording, tmp_path):
    again = wb.Recording.load(recording.save(tmp_path / "rec"))
    methods = [small(cls) for cls in EVICTING]
    assert wb.replay(again, methods, [0.4]).curves().equals(wb.replay(recording, methods, [0.4]).curves())


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda r: wb.replay(r, ["dense"], [0.5]), "'dense' has no budget to replay"),
        (lambda r: wb.replay(r, ["quest"], [0.5]), "'quest' selects what each step reads.*run it live"),
        (lambda r: wb.replay(r, ["mpcache"], [0.5]), "'mpcache' selects what each step reads.*run it live"),
        (lambda r: wb.replay(r, ["ems"], [0.5]), "'ems' changes K and V of the tokens it keeps.*run it live"),
        (lambda r: wb.replay(r, ["h2o:positions=slot"], [0.5]), "which no recording holds; run it live"),
        (lambda r: wb.replay(r, [], [0.5]), "nothing to replay"),
        (lambda r: wb.replay(r, ["h2o"], []), "nothing to replay"),
        (lambda r: wb.replay(r, ["h2"], [0.5]), "no method named 'h2'"),
        (lambda r: wb.replay(r, ["h2o"], [1.5]), "'budget' of 'h2o' cannot be 1.5"),
        (lambda r: wb.replay(r, ["h2o"], [0.5]).kept("h2o", 0.4, 0, 0), r"not replayed; replayed are h2o\(budget=0.5\)"),
        (lambda r: wb.replay(r, ["h2o"], [0.5]).kept("h2o", 0.5, 9, 0), r"Layer 9 was not recorded; .* \[0, 1, 2\]"),
        (lambda r: wb.replay(r, ["h2o"], [0.5]).kept("h2o", 0.5, 0, NEW), "no step 10; the decoded tokens are 0 to 9"),
    ],
)
def test_misuse_is_one_sentence(recording, use, message):
    with pytest.raises(wb.UserError, match=message):
        use(recording)


@pytest.mark.parametrize("cls", [cls for cls in CACHE if ROTATION in cls().needs], ids=lambda cls: cls.name)
def test_a_method_that_needs_more_than_a_recording_holds_is_refused(recording, cls):
    with pytest.raises(wb.UserError, match="which no recording holds; run it live"):
        wb.replay(recording, [cls()], [0.5])
