"""Decode-time decisions of all layers in one go are those of each layer by itself, in the memory each layer says."""

import dataclasses

import pytest
import torch

import workbench as wb
from workbench.methods import parse_method
from workbench.methods.cache.base import EVERY_STEP
from workbench.testing import ids, random_llama

ROWWISE = ["tova:budget=9", "streaming-llm:budget=9", "h2o:budget=9", "lazy-eviction:budget=9,window=3", "mpcache:budget=2"]


@pytest.fixture
def lm(tiny) -> wb.LM:
    """Two layers of random weights."""
    return wb.load((random_llama(), tiny.tokenizer))


def alone(method):
    """The same method, deciding layer by layer."""
    return dataclasses.dataclass(frozen=True)(type("Alone", (type(method),), {"rowwise": False}))(**dataclasses.asdict(method))


def test_every_method_that_is_rowwise_is_tried_here():
    from workbench.methods.base import METHODS

    assert {parse_method(text).name for text in ROWWISE} == {
        cls.name for cls in METHODS.values() if getattr(cls, "rowwise", False)
    }


@pytest.mark.parametrize("text", ROWWISE)
@pytest.mark.parametrize(
    "rows", [[ids(24)[0].tolist()], [ids(24)[0].tolist(), ids(17, seed=3)[0].tolist()]], ids=["one", "padded"]
)
def test_deciding_together_equals_deciding_alone(lm, text, rows):
    method = parse_method(text)
    sessions = [wb.Session(lm, each) for each in (method, alone(method))]
    for session in sessions:
        session.prefill(rows)
    for _ in range(8):
        together, apart = (session.step() for session in sessions)
        torch.testing.assert_close(together, apart, atol=1e-6, rtol=1e-6)
    traces = [session.trace for session in sessions]
    for table in ("evictions", "cache"):
        order = ["step", "layer", *(["row", "head", "position"] if table == "evictions" else ["op"])]
        first, second = (trace.table(table).sort_values(order).reset_index(drop=True) for trace in traces)
        assert first.equals(second)
    assert len(traces[0].table("evictions"))


def test_what_was_merged_together_went_where_it_went_alone(lm):
    members = {"rowwise": True, "acts": EVERY_STEP, "observes": EVERY_STEP}
    method = dataclasses.dataclass(frozen=True)(type("Merging", (wb.EMS,), members))(budget=9, tau=-1.0, eps=0.0)
    traces = []
    for each in (method, alone(method)):
        session = wb.Session(lm, each)
        session.prefill(ids(24)[0].tolist())
        session.generate(4)
        table = session.trace.table("evictions")
        traces.append(table.sort_values(["step", "layer", "head", "position"]).reset_index(drop=True))
    together, apart = traces
    assert together.equals(apart) and (together.query("step > 0")["into"] >= 0).any()


def test_layers_that_share_memory_weigh_what_they_hold(lm):
    session = wb.Session(lm, parse_method("tova:budget=9"))
    session.prefill(ids(24)[0].tolist())
    before = session.physical_bytes
    for _ in range(4):
        session.step()
    stores = [layer.store for layer in session._cache.layers]
    memory = {
        buffer.untyped_storage().data_ptr(): buffer.untyped_storage().nbytes()
        for s in stores
        for buffer in s.buffers().values()
    }
    assert session.physical_bytes == sum(memory.values()) == before
    branched = session.branch()
    session.step()
    assert branched.physical_bytes == before
    assert {
        buffer.untyped_storage().data_ptr() for layer in branched._cache.layers for buffer in layer.store.buffers().values()
    }.isdisjoint(memory)
