"""A model's fingerprint: the same for the same weights, another one for others."""

from __future__ import annotations

import torch

import workbench as wb
from workbench.models.fingerprint import fingerprint
from workbench.testing import random_llama, random_qwen_moe


def test_the_same_model_loaded_twice_has_one_fingerprint(tiny):
    assert fingerprint(wb.load("tiny-dense")) == fingerprint(tiny)
    assert fingerprint(wb.load((random_qwen_moe(), tiny.tokenizer))) == fingerprint(
        wb.load((random_qwen_moe(), tiny.tokenizer))
    )


def test_a_step_of_training_and_another_rotation_give_another(tiny):
    models = [random_llama(), random_llama(), random_llama(rope_parameters={"rope_type": "default", "rope_theta": 500.0})]
    with torch.no_grad():
        models[1].model.layers[2].mlp.up_proj.weight.mul_(1.001)
    found = {fingerprint(wb.load((model, tiny.tokenizer))) for model in models}
    assert len(found) == 3


def test_weights_that_are_not_in_memory_have_none(tiny):
    lm = wb.load((random_llama(), tiny.tokenizer))
    lm.model.lm_head.to("meta")
    assert fingerprint(lm) is None
