"""Attention mass of long contexts: what is exact, what is pooled, and how much it takes."""

from __future__ import annotations

import numpy as np
import torch

import workbench as wb
from workbench.cost.metrics import mass_by_position
from workbench.probes import importance
from workbench.probes.importance import ImportanceLog
from workbench.testing import ids, random_gemma, random_llama
from workbench.trace.store import TraceWriter
from workbench.trace.trace import Trace


def logged(masses, decoding=True):
    """The importance table of a run whose steps gave these masses `[1, heads, positions]` in one layer."""
    writer = TraceWriter({})
    log = ImportanceLog(writer)
    for step, mass in enumerate(masses):
        log.add(step, 0, 0, mass, 1, decoding)
    log.flush()
    return Trace(writer.meta, writer.tables()).table("importance"), log.meta()


def test_long_rows_hold_the_top_positions_exactly_and_all_of_the_mass():
    torch.manual_seed(0)
    mass = torch.rand(1, 2, 5000).square()
    table, meta = logged([mass])
    assert meta["exact_positions"] < 5000
    for head, row in enumerate(table.itertuples()):
        spread = mass_by_position(row)
        truth = mass[0, head].numpy()
        top = np.argsort(-truth)[: meta["top_positions"]]
        assert set(row.top_positions) == set(top)
        np.testing.assert_allclose(spread[top], truth[top], rtol=1e-3)
        np.testing.assert_allclose(spread.sum(), truth.sum(), rtol=1e-3)
        width = -(-5000 // meta["pools"])
        for start in range(0, 5000, width):
            np.testing.assert_allclose(spread[start : start + width].sum(), truth[start : start + width].sum(), rtol=5e-3)


def test_short_rows_are_exact():
    table, _ = logged([torch.arange(100.0).view(1, 1, -1)])
    assert table["top_positions"].item() is None
    np.testing.assert_array_equal(mass_by_position(next(table.itertuples())), np.arange(100))


def test_a_table_that_has_grown_sums_over_steps(monkeypatch):
    monkeypatch.setattr(importance, "FULL_BYTES", 2000)
    monkeypatch.setattr(importance, "MORE_BYTES", 1000)
    masses = [torch.ones(1, 1, 50 + step) for step in range(100)]
    table, meta = logged(masses)
    assert table["window"].sum() == 100
    assert meta["decode_steps_a_row_at_the_end"] > 4 and len(table) < 60
    total = sum(mass_by_position(row).sum() for row in table.itertuples())
    np.testing.assert_allclose(total, sum(mass.sum().item() for mass in masses))


def test_sums_over_steps_of_a_sliding_layer_stay_at_their_positions(monkeypatch):
    model = random_gemma(attn_implementation="eager")
    prompt = ids(30)
    with wb.profile(model, importance="decode") as exact:
        model.generate(prompt, max_new_tokens=9, do_sample=False)
    monkeypatch.setattr(importance, "FULL_BYTES", 1)
    monkeypatch.setattr(importance, "MORE_BYTES", 2000)
    with wb.profile(model, importance="decode") as summed:
        model.generate(prompt, max_new_tokens=9, do_sample=False)
    assert summed.trace.table("importance")["window"].max() > 1
    for layer in range(3):
        totals = []
        for trace in (exact.trace, summed.trace):
            by_position = np.zeros(40)
            for row in trace.table("importance").query(f"layer == {layer}").itertuples():
                by_position[row.start : row.start + row.length] += mass_by_position(row)
            totals.append(by_position)
        np.testing.assert_allclose(totals[0], totals[1], atol=5e-3)


def test_a_trace_of_32k_tokens_stays_small(tmp_path):
    """A prompt of 32,000 tokens and 200 decoded ones of a model with 72 heads, as the profiler would log them."""
    writer = TraceWriter({"anatomy": wb.load("tiny-dense").anatomy.to_dict()}, tmp_path / "long.trace")
    log = ImportanceLog(writer)
    generator = torch.Generator().manual_seed(0)
    base = torch.rand(1, 4, 32_200, generator=generator)
    for layer in range(18):
        log.add(0, layer, 0, base[..., :32_000], 32_000, False)
    for step in range(1, 201):
        for layer in range(18):
            log.add(step, layer, 0, base[..., : 32_000 + step], 1, True)
    log.flush()
    writer.close(importance_pooling=log.meta())
    size = sum(path.stat().st_size for path in (tmp_path / "long.trace").rglob("*") if path.is_file())
    assert size < 20e6
    trace = Trace.load(tmp_path / "long.trace")
    assert trace.meta["importance_pooling"]["top_positions"] == importance.TOP_POSITIONS


def test_profile_states_the_pooling():
    with wb.profile(random_llama(), importance="full") as prof, torch.no_grad():
        prof.model(ids(9))
    assert prof.trace.meta["importance_pooling"]["exact_positions"] == importance.EXACT_POSITIONS
