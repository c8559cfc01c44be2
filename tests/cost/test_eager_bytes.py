"""Eager bytes against a counter of every operand, by component and in all, on every family."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten
from transformers import DynamicCache

import workbench as wb
from workbench.models.anatomy import attention_modules, expert_modules
from workbench.testing import FAMILIES, ids, random_llama, random_model

PRODUCTS = ["attention.qkv", "attention.out", "mlp", "router", "lm_head", "unattributed"]
RUNNABLE = [family for family in FAMILIES if family != "jetmoe"]  # JetMoE's routing looks at values: no shapes-only run


class Oracle(TorchDispatchMode):
    """Bytes of every tensor in and out of each operation that is no view, by where it happens."""

    def __init__(self):
        super().__init__()
        self.bytes = Counter()
        self.where = "elsewhere"

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if not func.is_view and name != "_unsafe_view":
            flat, _ = tree_flatten((args, kwargs, out))
            moved = sum(t.numel() * t.element_size() for t in flat if isinstance(t, torch.Tensor))
            product = self.where == "elsewhere" and name in {"mm", "addmm", "bmm"}
            self.bytes["product" if product else self.where] += moved
        return out

    def inside(self, where, function):
        def call(*args, **kwargs):
            before, self.where = self.where, where
            try:
                return function(*args, **kwargs)
            finally:
                self.where = before

        return call


@pytest.fixture(scope="module", params=RUNNABLE)
def model(request):
    return random_model(request.param, attn_implementation="eager", experts_implementation="eager")


def counted(oracle, monkeypatch, model):
    """The oracle, told where attention, the cache and the experts are at work."""
    module = sys.modules[type(attention_modules(model)[0]).__module__]
    if hasattr(module, "eager_attention_forward"):
        monkeypatch.setattr(module, "eager_attention_forward", oracle.inside("attention", module.eager_attention_forward))
    monkeypatch.setattr(DynamicCache, "update", oracle.inside("cache", DynamicCache.update))
    for part in expert_modules(model).values():
        monkeypatch.setattr(part, "forward", oracle.inside("experts", part.forward))
    return oracle


@torch.no_grad()
def run(model, lengths, batch, padding_mask, oracle=None, seen=None):
    cache, past = DynamicCache(config=model.config), 0
    for length in lengths:
        tokens = ids(length, batch)
        mask = torch.ones(batch, past + length, dtype=torch.long) if padding_mask else None
        with oracle or nullcontext():
            model(tokens, attention_mask=mask, past_key_values=cache)
        past += length
        if oracle:
            seen.append(oracle.bytes)
            oracle.bytes = Counter()


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("padding_mask", [False, True])
def test_equals_the_oracle(model, monkeypatch, batch, padding_mask):
    """Prefill, decode, decode and a multi-token append, each on its own; lengths on both sides of the sliding window."""
    lengths = (37, 1, 1, 5)
    with wb.profile(model) as prof:
        run(model, lengths, batch, padding_mask)
    seen = []
    oracle = counted(Oracle(), monkeypatch, model)
    run(model, lengths, batch, padding_mask, oracle, seen)
    moved = prof.trace.bytes(by=["step", "component"], model="eager").pivot(index="step", columns="component", values="bytes")
    moved = moved.fillna(0)
    for step, truth in enumerate(seen):
        ours = moved.loc[step]
        if truth["attention"]:
            assert ours["attention.scores"] == truth["attention"]
            assert ours["cache"] == truth["cache"]
            assert sum(ours.get(name, 0) for name in PRODUCTS) == truth["product"]
        assert ours.get("experts", 0) == truth["experts"]
        assert ours.sum() == pytest.approx(truth.total(), rel=0.02)


def test_the_arithmetic_of_a_llama():
    """One step by hand: 3 layers, d=32, 4 query and 2 kv heads of 8, f=48, V=96, float32, 10 tokens in, 10 logits."""
    model = random_llama()
    with wb.profile(model) as prof, torch.no_grad():
        model(ids(10))
    moved = prof.trace.bytes(by="component", model="eager").set_index("component")["bytes"]
    t, scores = 10, 4 * 10 * 10
    assert moved["attention.qkv"] == 3 * 4 * (3 * t * 32 + t * (32 + 16 + 16) + 32 * (32 + 16 + 16))
    assert moved["attention.out"] == 3 * 4 * (2 * t * 32 + 32 * 32)
    assert moved["mlp"] == 3 * 4 * (3 * t * (32 + 48) + 3 * 32 * 48)
    assert moved["lm_head"] == 4 * (t * (32 + 96) + 32 * 96)
    assert moved["embedding"] == 8 * t + 4 * 96 * 32 + 4 * t * 32  # the table counts whole, as the operation takes it
    assert moved["cache"] == 3 * 4 * 2 * (2 * t * 2 * 8)  # K and V: new rows in, all rows out
    repeat = 2 * 2 * t * 4 * 8  # K and V for every query head: in and out
    products = 2 * t * 4 * 8 + 2 * t * 4 * 8 + 2 * scores  # q, k, v and the output, and the scores twice
    elementwise = 2 * scores + (2 * scores + t * t) + 2 * scores  # scaled, masked, softmax
    assert moved["attention.scores"] == 3 * 4 * (repeat + products + elementwise + 2 * t * 32)  # and the output made contiguous


def test_a_model_whose_code_looks_at_values_says_so():
    with wb.profile(random_model("jetmoe")) as prof, torch.no_grad():
        prof.model(ids(5))
    with pytest.raises(wb.UserError, match=r"eager bytes of this trace are not known \(.*\); use model='fused'"):
        prof.trace.bytes(model="eager")


def test_saved_traces_know_their_eager_bytes(tmp_path):
    with wb.profile(random_model("qwen3_moe"), out=tmp_path / "run.trace") as prof, torch.no_grad():
        prof.model(ids(5))
    expected = prof.trace.bytes(by=["layer", "component"], model="eager")
    assert wb.Trace.load(tmp_path / "run.trace").bytes(by=["layer", "component"], model="eager").equals(expected)
