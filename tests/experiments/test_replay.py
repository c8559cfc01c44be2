"""A replay keeps what a live run keeps, and its numbers are those of attention computed anew over what was kept."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch

import workbench as wb
import workbench.experiments.replay as replaying
from workbench.engine.policy import FORESIGHT, THINNING
from workbench.experiments.replay_layers import follow
from workbench.methods import METHODS
from workbench.models.lookahead import Lookahead, lookahead_folder
from workbench.testing import calibrate_all, ids, random_llama, random_model

PROMPT, NEW = 40, 10
CACHE = [cls for cls in METHODS.values() if cls.slot == "cache" and cls.name != "dense"]
SERVED = [cls for cls in CACHE if THINNING not in cls().needs]


def small(cls, budget=0.5, **knobs):
    """The method with knobs that fit prompts of a few dozen tokens."""
    fitting = {"window": 2 if cls.name == "lazy-eviction" else 8, "mode": "pseudo", "horizon": NEW}
    fitting |= {"page": 4, "dense_layers": 0, "sinks": 2, "recent": 2 if cls.name == "duo-attention" else 0.5} | knobs
    own = cls.__dataclass_fields__.keys() - set(cls.calibrated_by or ())  # the models here are calibrated as by default
    return cls(budget=budget, **{name: value for name, value in fitting.items() if name in own})


def variants(cls) -> list:
    """The method, and those of its ways of working that a replay has to follow differently, one knob at a time."""
    made = {ways(small(cls)): small(cls)}
    for knob in dataclasses.fields(cls):
        others = (True, False) if isinstance(knob.default, bool) else knob.metadata.get("choices", ())
        for each in (small(cls, **{knob.name: choice}) for choice in others):
            made.setdefault(ways(each), each)
    return list(made.values())


def ways(method) -> tuple:
    """What a replay looks at to know how to follow a method."""
    rehearsal = method.rehearsal([[2] * PROMPT]) if FORESIGHT in method.needs else None
    own = tuple(getattr(method, knob, None) for knob in ("share_heads", "merge_keys"))
    return method.acts, method.joint, method.by_slot, method.needs_calibration, rehearsal, own


VARIANTS = [method for cls in SERVED for method in variants(cls)]


def name_of(method) -> str:
    return method.label.replace("budget=0.5, ", "")


@pytest.fixture(scope="module", params=[1, 2], ids=["MQA", "GQA"])
def lm(request, tiny) -> Iterator[wb.LM]:
    lm = calibrate_all(wb.load((random_llama(request.param), tiny.tokenizer)))
    soft_tokens = Lookahead(lm.model, tokens=6).save(lookahead_folder() / "small.safetensors", lm.model, {})
    yield lm
    soft_tokens.unlink()


@pytest.fixture(scope="module")
def recording(lm) -> wb.Recording:
    return wb.record(lm, ids(PROMPT), new_tokens=NEW, rehearse=VARIANTS)


@contextmanager
def first_outputs(lm):
    """Attention output `[Hq, D]` of layer 0 at each call's last token, as the model's output projection gets it."""
    seen = []
    projection = lm.model.model.layers[0].self_attn.o_proj
    handle = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0][0, -1].view(4, 8).clone()))
    try:
        yield seen
    finally:
        handle.remove()


@pytest.fixture(scope="module")
def dense_outputs(lm, recording) -> torch.Tensor:
    """`[Hq, S, D]` of layer 0 along the recorded tokens."""
    session = wb.Session(lm)
    session.prefill(ids(PROMPT))
    with first_outputs(lm) as seen:
        for token in recording.trace.table("tokens")["id"].tolist()[PROMPT:]:
            session.step([token])
    return torch.stack(seen, 1)


@pytest.mark.parametrize("budget", [0.3, 0.9, PROMPT - 1])
@pytest.mark.parametrize("method", VARIANTS, ids=name_of)
def test_what_is_kept_and_read_and_its_error_are_those_of_a_live_run(lm, recording, dense_outputs, method, budget):
    """Kept in every layer when the first token is decoded; all of it in layer 0 at every step: see `Replay`."""
    method = method.with_budget(budget)
    replay = wb.replay(recording, [method], [budget])
    session = wb.Session(lm, method)
    session.prefill(ids(PROMPT))
    tokens = recording.trace.table("tokens")["id"].tolist()[PROMPT:]
    num_read = []
    with first_outputs(lm) as outputs:
        for step, token in enumerate(tokens):
            held = [layer.store.positions[0].tolist() for layer in session._cache.layers]
            for layer in range(len(held) if step == 0 else 1):
                expected = [sorted({*head, PROMPT + step} - {-1}) for head in held[layer]]
                assert [head.tolist() for head in replay.kept(method.label, budget, layer, step)] == expected
            session.step([token])
            selected = session._cache.layers[0].selected
            expected = [sorted({*head, PROMPT + step} - {-1}) for head in held[0]]
            if selected is not None:
                expected = [sorted({*head} - {-1}) for head in selected[0].reshape(len(expected), -1).tolist()]
            assert [head.tolist() for head in replay.read(method.label, budget, 0, step)] == expected
            num_read.append(sum(map(len, expected)) if selected is None else int((selected >= 0).sum()))
    (point,) = replay.points
    live = session.trace.select(phase="decode").table("cache").query("op == 'append' and layer == 0")["held_tokens"]
    assert point.held_bytes[0].tolist() == (live * 2 * 8 * 4).tolist()
    assert point.read_bytes[0].tolist() == [tokens * 2 * 8 * 4 for tokens in num_read]
    error = (torch.stack(outputs, 1) - dense_outputs).norm(dim=-1) / dense_outputs.norm(dim=-1)
    assert point.output_error[0] == pytest.approx(error.numpy(), abs=2e-5)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt_oss"])
@pytest.mark.parametrize("name", ["snapkv:window=8", "h2o", "quest:page=2,dense_layers=1"])
def test_mass_and_error_are_those_of_attention_over_what_is_read(tiny, family, name):
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
            kept = torch.tensor(replay.read(point.method, 0.3, layer.layer, step)[kv_head])
            alone = torch.cat([scores[kept], sink]).softmax(0)[: len(kept)]
            values = layer.values[kv_head, : position + 1]
            full, out = dense @ values, alone @ values[kept]
            retained = float(dense[kept].sum() / dense.sum())
            assert point.mass_retained[number, head, step] == pytest.approx(retained, abs=1e-5)
            assert point.output_error[number, head, step] == pytest.approx(float((out - full).norm() / full.norm()), abs=1e-4)


def test_the_readme_names_the_methods_a_replay_does_not_serve(recording):
    refused = [cls for cls in CACHE if cls not in SERVED]
    for cls in refused:
        with pytest.raises(wb.UserError, match="run it live"):
            wb.replay(recording, [cls()], [0.5])
    names = ", ".join(f"`{cls.name}`" for cls in refused)
    assert f"`wb.replay` serves every cache method but {names}" in (Path(wb.__file__).parent.parent / "README.md").read_text()


def test_the_whole_prompt_is_dense(recording):
    curves = wb.replay(recording, VARIANTS, [1000]).curves()
    assert np.allclose(curves["mass_retained"], 1, atol=1e-6) and np.allclose(curves["output_error"], 0, atol=1e-5)
    assert np.allclose(curves["oracle_mass"], 1, atol=1e-6)


def test_no_method_passes_the_oracle(recording):
    curves = wb.replay(recording, VARIANTS, [1, 0.2, 0.8]).curves()
    assert len(curves) == 3 * len(VARIANTS)
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
    replay = wb.replay(recording, ["h2o", "snapkv:window=8", "quest:page=4", "mpcache"], [0.3])
    for row in replay.curves().itertuples():
        table = replay.table(row.method, 0.3)
        assert table["mass_retained"].mean() == pytest.approx(row.mass_retained)
        assert table["oracle_mass"].mean() == pytest.approx(row.oracle_mass)
        once_a_kv_head = table[table["head"] % recording.trace.anatomy.layers[0].attention.group == 0]
        assert once_a_kv_head.query(f"step == {NEW - 1}")["bytes"].sum() == row.bytes
        kept = table.query("layer == 1 and head == 0 and step == 2")["kept"].item()
        assert kept == len(replay.kept(row.method, 0.3, 1, 2)[0])
        read = table.query("layer == 2 and head == 0 and step == 2")["read"].item()
        assert read == len(replay.read(row.method, 0.3, 2, 2)[0])
        assert (row.read_bytes < row.bytes) == (row.method in ("quest(page=4)", "mpcache"))


@pytest.mark.parametrize("method", VARIANTS, ids=name_of)
def test_budgets_replayed_together_are_those_replayed_alone(recording, method):
    budgets = [0.2, 7, 0.6, 1000]
    together = wb.replay(recording, [method], budgets)
    for budget, point in zip(budgets, together.points, strict=True):
        (alone,) = wb.replay(recording, [method], [budget]).points
        assert np.array_equal(point.gone, alone.gone) and np.array_equal(point.held_bytes, alone.held_bytes)


@pytest.mark.parametrize("name", [cls.name for cls in SERVED if cls.rowwise])
def test_layers_followed_as_rows_of_a_batch_are_those_followed_alone(recording, name):
    method = small(METHODS[name], budget=0.3)
    together = follow(recording, method, recording.layers)
    for layer in recording.layers:
        alone, beside = follow(recording, method, [layer])[layer.layer], together[layer.layer]
        for field in dataclasses.fields(alone):
            one, other = getattr(alone, field.name), getattr(beside, field.name)
            assert (one is None and other is None) or one.dtype == other.dtype
            if one is not None:
                torch.testing.assert_close(one, other)


def test_layers_side_by_side_give_what_they_give_one_after_another(recording):
    methods = VARIANTS[::4]
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


def test_a_merge_loses_mass_and_changes_the_output(recording):
    """What was merged into a token is not held, so mass is that of the same sets unmerged; the output is another."""
    merged, plain = wb.replay(recording, ["ems:window=8,tau=-1.0,eps=0.0", "ems:window=8,tau=2.0"], [0.3]).points
    assert np.array_equal(merged.gone, plain.gone)
    assert merged.mass_retained == pytest.approx(plain.mass_retained, abs=1e-6)
    assert np.abs(merged.output_error - plain.output_error).max() > 1e-3


def test_tokens_that_close_ranks_hold_the_same_and_give_another_output(recording):
    slot, true = wb.replay(recording, ["streaming-llm:positions=slot", "streaming-llm"], [0.3]).points
    assert np.array_equal(slot.gone, true.gone) and np.array_equal(slot.mass_retained, true.mass_retained)
    assert np.abs(slot.output_error - true.output_error).max() > 1e-3


def test_rehearsals_that_are_alike_are_recorded_once(lm):
    alike = ["dapq:tokens=6", "lookahead-kv:mode=pseudo,tokens=6", "dapq:tokens=6,pooling=max", "h2o", wb.Oracle(horizon=3)]
    recording = wb.record(lm, ids(PROMPT), new_tokens=3, rehearse=alike)
    assert [rehearsal["count"] for rehearsal in recording.rehearsals] == [6]
    assert all(layer.foresight.shape == (1, 4, PROMPT) for layer in recording.layers)
    longer = wb.record(lm, ids(PROMPT), new_tokens=2, rehearse=[wb.Oracle(horizon=3)])
    ahead, along = (wb.replay(each, [wb.Oracle(horizon=3)], [0.3]).points[0] for each in (longer, recording))
    assert np.array_equal(ahead.gone == 2, (along.gone == 3)[..., :-1])


def test_a_model_whose_rotation_is_unknown_is_refused_only_what_needs_it(recording):
    unknown = dataclasses.replace(recording.layers[1], frequencies=None)
    blind = dataclasses.replace(recording, layers=(recording.layers[0], unknown))
    for name in ("expected-attention", "duo-attention", "h2o:positions=slot"):
        with pytest.raises(wb.UserError, match=r"how the model rotates keys, which is unknown of layers \[1\]; choose another"):
            wb.replay(blind, [name], [0.5])
    assert wb.replay(blind, ["h2o", "quest", "ems"], [0.5]).points


def test_one_token_is_not_the_whole_prompt(recording):
    replay = wb.replay(recording, ["h2o"], [1, 1.0, 1])
    assert [len(replay.kept("h2o", budget, 0, 0)[0]) for budget in (1, 1.0)] == [2, PROMPT + 1]
    assert len(replay.points) == 2


def test_a_recording_is_not_changed(recording):
    before = [tensor.clone() for layer in recording.layers for tensor in layer.tensors().values()]
    wb.replay(recording, VARIANTS, [0.3, PROMPT - 1])
    after = [tensor for layer in recording.layers for tensor in layer.tensors().values()]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


def test_a_saved_recording_replays_the_same(recording, tmp_path):
    again = wb.Recording.load(recording.save(tmp_path / "rec"))
    methods = VARIANTS
    assert wb.replay(again, methods, [0.4]).curves().equals(wb.replay(recording, methods, [0.4]).curves())


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda r: wb.replay(r, ["dense"], [0.5]), "'dense' has no budget to replay"),
        (lambda r: wb.replay(r, ["fastkv"], [0.5]), "'fastkv' changes what later layers compute.*run it live"),
        (lambda r: wb.replay(r, ["dapq:tokens=5"], [0.5]), r"does not hold; give the method to wb.record\(.*rehearse="),
        (lambda r: wb.replay(r, ["oracle:horizon=11"], [0.5]), "11 tokens ahead and the recording has 10; .*new_tokens=11"),
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
