"""Spans: every layer and its parts, nested, once a call."""

from __future__ import annotations

import json

import pytest
import torch

import workbench as wb
from workbench.testing import ids, random_llama, random_model


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gemma3_text", "gpt2", "falcon", "deepseek_v3"])
def test_every_layer_has_its_spans_once_a_call_inside_the_layer(family):
    model = random_model(family)
    with wb.profile(model, spans=True) as prof, torch.no_grad():
        model(ids(7))
        model(ids(5))
    spans, steps = prof.trace.table("spans"), prof.trace.table("steps").set_index("step")
    experts = [layer.index for layer in prof.anatomy.layers if layer.experts]
    for step in (0, 1):
        of_step = spans[spans["step"] == step]
        for name in ("layer", "attention", "mlp"):
            assert sorted(of_step.loc[of_step["name"] == name, "layer"].unique()) == [0, 1, 2], name
        assert sorted(of_step.loc[of_step["name"] == "experts", "layer"]) == experts
        assert set(of_step.loc[of_step["layer"] == -1, "name"]) == {"embedding", "lm_head"}
        blocks = of_step[of_step["name"] == "layer"].set_index("layer")
        assert blocks.index.is_unique
        assert (blocks["duration_ns"].sum() < steps["duration_ns"][step]).all()
        for span in of_step[(of_step["layer"] >= 0) & (of_step["name"] != "layer")].itertuples():
            outer = blocks.loc[span.layer]
            assert outer.start_ns <= span.start_ns
            assert span.start_ns + span.duration_ns <= outer.start_ns + outer.duration_ns
    assert spans["device_ns"].isna().all()  # no GPU here: null, not 0


def test_spans_are_on_request_and_go_into_the_export(tmp_path):
    model = random_llama()
    with wb.profile(model) as plain, torch.no_grad():
        model(ids(4))
    assert plain.trace.table("spans").empty
    with wb.profile(model, spans=True) as prof, torch.no_grad():
        model(ids(4))
    events = json.loads(prof.trace.to_perfetto(tmp_path / "run.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if event["ph"] == "X"}
    assert {"prefill", "layer 0", "attention 2", "mlp 1", "lm_head"} <= names


def test_a_call_that_fails_leaves_no_spans_to_the_next():
    model = random_llama()
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(RuntimeError("stop")))
    with wb.profile(model, spans=True) as prof, torch.no_grad():
        with pytest.raises(RuntimeError, match="stop"):
            model(ids(4))
        handle.remove()
        model(ids(4))
    spans = prof.trace.table("spans")
    assert set(spans["step"]) == set(prof.trace.table("steps")["step"])
    assert (spans["name"] == "layer").sum() == 3
