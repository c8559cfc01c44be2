"""Banks are made once a model and method, anew where anything they stand on differs, and go with the model."""

from __future__ import annotations

import gc
import weakref
from dataclasses import dataclass
from typing import ClassVar

import torch

import workbench as wb
from workbench.engine.banks import banks_of
from workbench.engine.calibration import Calibration
from workbench.engine.experts import OwnBank
from workbench.methods import ExpertMethod, knob
from workbench.models.anatomy import expert_modules
from workbench.testing import random_qwen_moe

made: list[int] = []


@dataclass(frozen=True)
class Copied(ExpertMethod):
    """Computes one layer with the model's own experts, one by one."""

    name: ClassVar[str] = "copied"
    calibrated_by: ClassVar[tuple[str, ...]] = ()

    layer: int = knob(0)

    def banks(self, lm):
        made.append(self.layer)
        experts = lm.anatomy.layers[self.layer].experts
        return {self.layer: OwnBank(expert_modules(lm.model)[self.layer], experts, lm.anatomy.element_bytes)}


def told(layer: int, value: float = 1.0) -> Copied:
    return Copied(layer).with_calibration(Calibration("copied", {}, "none", (0,), {}, {"scores": torch.tensor([value])}))


def test_banks_are_made_once_for_the_same_method_calibration_and_weights(tiny):
    lm = wb.load((random_qwen_moe(), tiny.tokenizer))
    made.clear()
    first = banks_of(told(1), lm)
    assert banks_of(told(1), lm) is first and made == [1]
    assert banks_of(told(1, 2.0), lm) is not first and banks_of(told(2), lm).keys() == {2} and made == [1, 1, 2]
    assert banks_of(told(1, 2.0), lm).keys() == {1} and made == [1, 1, 2]  # the last two are held
    with torch.no_grad():
        expert_modules(lm.model)[0].down_proj.mul_(2)
    assert banks_of(told(2), lm).keys() == {2} and made == [1, 1, 2, 2]
    assert told(2).resident_bytes(lm) == wb.TopK().resident_bytes(lm) and len(made) == 4


def test_banks_do_not_keep_their_model(tiny):
    lm = wb.load((random_qwen_moe(), tiny.tokenizer))
    banks_of(told(0), lm)
    gone = weakref.ref(lm.model)
    del lm
    gc.collect()
    assert gone() is None


def test_an_expert_is_the_familys_own_code_and_equals_the_grouped_kernel(tiny):
    lm = wb.load((random_qwen_moe(), tiny.tokenizer))
    module = expert_modules(lm.model)[0]
    hidden = torch.randn(5, 32, generator=torch.Generator().manual_seed(0))
    experts = torch.full((5, 1), 3)
    expected = module(hidden, experts, torch.ones(5, 1))
    bank = OwnBank(module, lm.anatomy.layers[0].experts, 4)
    torch.testing.assert_close(bank.compute(3, hidden), expected, atol=1e-6, rtol=1e-5)
