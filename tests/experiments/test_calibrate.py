"""Calibration: run once a model, kept, found by every session, and a missing or wrong one is one sentence."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import workbench as wb
from workbench.engine.calibration import Document, Needle, calibration_file
from workbench.experiments.calibrate import calibrations, observed, recall_documents, ship
from workbench.methods import parse_method
from workbench.methods.cache.base import CacheMethod, keep_top
from workbench.methods.routing.trained import TrainedBlock
from workbench.models.fingerprint import fingerprint
from workbench.testing import ids, random_llama

CALIBRATED = [method for cls in wb.METHODS.values() for method in cls.to_calibrate()]


@dataclass(frozen=True)
class Popular(CacheMethod):
    """Keeps the positions that calibration prompts gave most attention to: a method as a notebook cell would have it."""

    name: ClassVar[str] = "popular"
    calibrated_by: ClassVar[tuple[str, ...]] = ("sharpness",)
    budget: float = 0.5
    sharpness: float = 2.0

    def calibrate(self, samples):
        masses = [torch.stack([state.mass[0].sum(0) for state in sample.layers]) for sample in samples]
        return {"popularity": torch.stack(masses).mean(0) ** self.sharpness}

    def keep(self, state):
        scores = self.table("popularity", state)[: state.keys.shape[2]].expand(state.positions.shape)
        return keep_top(scores, state.capacity, state.occupied)


def serving(lm: wb.LM) -> list[wb.Method]:
    """The methods that take a model of this make."""

    def serves(method) -> bool:
        try:
            return method.slot == "cache" or method.check(lm.anatomy) is None
        except wb.UserError:
            return False

    return list(filter(serves, CALIBRATED))


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("WORKBENCH_CACHE", str(tmp_path))
    return tmp_path


@pytest.fixture
def lm(tiny) -> wb.LM:
    return wb.load((random_llama(), tiny.tokenizer))


def documents(length: int = 30) -> list[Document]:
    prompt = ids(length)[0].tolist()
    return [Document((*prompt, *prompt[4:7]), length, (Needle(4, 7, (length - 1, length, length + 1)),))]


def test_a_method_of_a_notebook_cell_is_calibrated_and_found_by_sessions_comparisons_and_replays(cache, lm):
    method = Popular(budget=0.5)
    with pytest.raises(wb.UserError, match=r"workbench calibrate --model \S+ --method popular:sharpness=2.0"):
        wb.Session(lm, method)
    found = wb.calibrate(lm, method, documents=documents())
    assert found.knobs == {"sharpness": 2.0} and found.layers == (0, 1, 2) and found.tables["popularity"].shape == (3, 33)
    session = wb.Session(lm, method)
    session.prefill(ids(20, seed=3))
    best = found.tables["popularity"][1, :20].argsort(descending=True)[:10]
    assert set(session._cache.layers[1].store.positions[0, 0].tolist()) == set(best.tolist())
    dense = wb.Session(lm)
    dense.prefill(ids(20, seed=3))
    dense.swap(method)
    dense.step()
    assert session.setup.label == method.label == dense.setup.label
    recording = wb.record(lm, ids(20, seed=3), new_tokens=3)
    replayed = wb.replay(recording, [method], [0.5])
    assert set(replayed.kept(method.label, 0.5, 1, 0)[0].tolist()) == {*best.tolist(), 20}
    with pytest.raises(wb.UserError, match=r"sharpness=1\.0"):
        wb.replay(recording, [Popular(sharpness=1.0)], [0.5])


def test_trained_gates_are_kept_as_any_calibration(cache, lm, monkeypatch):
    monkeypatch.setattr("workbench.engine.gates.PASSES", 20)
    method = wb.DuoAttention(budget=14, sinks=2, recent=4)
    with pytest.raises(wb.UserError, match=r"workbench calibrate --model \S+ --method duo-attention:gates=trained"):
        wb.Session(lm, method)
    told = []
    found = wb.calibrate(lm, method, documents=documents(70), on_progress=lambda *each: told.append(each))
    assert told == [("duo-attention: steps", done, 20) for done in range(1, 21)]
    assert found.tables["gates"].shape == (3, 2) and found.tables["gates"].max() < 1
    session = wb.Session(lm, method)
    session.prefill(ids(30))
    # 6 heads of mean 14, 6 a streaming head: 84 - 36 = 48 are two whole heads of 24 more, the two best
    held = torch.cat([(layer.store.positions[0] >= 0).sum(-1) for layer in session._cache.layers])
    best = found.tables["gates"].flatten().argsort(descending=True, stable=True)[:2]
    assert (
        found.tables["gates"].unique().numel() > 1 and (held == 30).nonzero().flatten().tolist() == best.sort().values.tolist()
    )


def test_a_sample_is_a_dense_run_over_all_tokens(lm):
    (document,) = documents()
    sample = observed(lm, document, with_rotation=True)
    assert [state.layer for state in sample.layers] == [0, 1, 2] and sample.layers[0].rotation is not None
    assert torch.isclose(sample.layers[2].mass.sum(), torch.tensor(4.0 * 33))
    recording = wb.record(lm, document.tokens[:32], new_tokens=1)
    assert torch.allclose(sample.layers[1].queries[0, :, :32], recording.layers[1].queries[:, :32], atol=1e-6)
    assert sample.prompts()[1].keys.shape[2] == 30 and sample.projections[0] is lm.model.model.layers[0].self_attn.o_proj


def test_a_calibration_of_another_model_or_other_knobs_is_refused(cache, lm, tiny):
    found = wb.calibrate(lm, Popular(), documents=documents())
    with pytest.raises(wb.UserError, match="of another model"):
        wb.Session(tiny, Popular().with_calibration(found))
    with pytest.raises(wb.UserError, match=r"with \{'sharpness': 2.0\}, not of 'popular'"):
        wb.Session(lm, Popular(sharpness=3.0).with_calibration(found))
    moved = calibration_file(fingerprint(tiny), Popular())
    found.save(moved)
    with pytest.raises(wb.UserError, match="of another model"):
        wb.Session(tiny, Popular())
    moved.write_bytes(b"nothing")
    with pytest.raises(wb.UserError, match="no calibration"):
        wb.Session(tiny, Popular())
    with pytest.raises(wb.UserError, match="does not know its calibration"):
        _ = Popular().tables


def test_what_cannot_be_calibrated_is_one_sentence(cache, lm, monkeypatch):
    with pytest.raises(wb.UserError, match="needs no calibration; those that do are"):
        wb.calibrate(lm, "h2o")
    with pytest.raises(wb.UserError, match=r"gates=prompt.*goes by the prompt and needs no calibration; choose gates=trained"):
        wb.calibrate(lm, "duo-attention:gates=prompt")
    with pytest.raises(wb.UserError, match=r"'prefixkv.*goes by the prompt and needs no calibration; choose ratios=calibrated"):
        wb.calibrate(lm, "prefixkv")
    for useless in (documents(), [Document(tuple(ids(70)[0].tolist()), 70)]):
        with pytest.raises(wb.UserError, match="texts of more than 36 tokens that repeat a passage"):
            wb.calibrate(lm, "duo-attention", documents=useless)
    with pytest.raises(wb.UserError, match="no text"):
        wb.calibrate(lm, Popular(), documents=[])
    blocked = cache / "file"
    blocked.write_text("")
    monkeypatch.setenv("WORKBENCH_CACHE", str(blocked))
    with pytest.raises(wb.UserError, match="set WORKBENCH_CACHE"):
        wb.calibrate(lm, Popular(), documents=documents())


def test_a_failed_swap_changes_nothing(cache, lm):
    session = wb.Session(lm)
    session.prefill(ids(20))
    with pytest.raises(wb.UserError, match="is not calibrated"):
        session.swap(Popular())
    assert session.setup.label == "dense" and session.step().shape == (1, 96)


def test_recall_documents_ask_for_what_they_state(tiny):
    for document in recall_documents(tiny, 2, context=200):
        assert document.prompt_tokens <= 200 and len(document.needles) == 4
        for needle in document.needles:
            asked = [document.tokens[position + 1] for position in needle.asking]
            assert asked == list(document.tokens[needle.start : needle.stop])
            assert needle.stop <= document.prompt_tokens <= needle.asking[0]


@pytest.mark.parametrize("name", ["tiny-dense", "tiny-moe"])
def test_built_in_models_come_calibrated(cache, name):
    lm = wb.load(name)
    known = calibrations(lm)
    assert [parse_method(title) for title in known] == serving(lm) and all(known.values())


def test_what_is_shipped_is_what_a_calibration_finds(cache, tiny, tmp_path, monkeypatch):
    """All but what is trained, which takes up to minutes: their own tests say what those are worth."""
    monkeypatch.setattr(TrainedBlock, "to_calibrate", lambda: ())
    monkeypatch.setattr(wb.DuoAttention, "to_calibrate", lambda: (wb.DuoAttention(gates="calibrated"),))
    for trained in (wb.DuoLLM, wb.InformedRouting):
        monkeypatch.setattr(trained, "to_calibrate", tuple)
    shipped = calibrations(tiny)
    monkeypatch.setattr("workbench.engine.calibration.BUILTIN", tmp_path)
    for path, (name, known) in zip(ship("tiny-dense"), shipped.items(), strict=True):
        again = wb.Calibration.load(path)
        assert path.is_relative_to(tmp_path) and again == known
        for table, tensor in again.tables.items():
            torch.testing.assert_close(tensor, known.tables[table], atol=1e-3, rtol=1e-3, msg=f"{name} {table}")


def test_a_file_holds_all_there_is(cache, lm, tmp_path):
    found = wb.calibrate(lm, Popular(), documents=documents())
    again = wb.Calibration.load(found.save(tmp_path / "own.safetensors"))
    assert again == found and torch.equal(again.tables["popularity"], found.tables["popularity"])
    assert json.dumps(again.about) and again.about["tokens"] == 33
