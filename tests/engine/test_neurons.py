"""Inner neurons of experts: found in whatever way a family stores them, and refused where they cannot be told apart."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import workbench as wb
from workbench.engine.experts import alone, apply
from workbench.engine.neurons import neurons
from workbench.models.anatomy import expert_modules
from workbench.testing import random_model

SQUARE = [("gpt_oss", 16), ("gpt_oss", 32), ("mixtral", 16), ("mixtral", 32)]
"""Inner sizes at which gate and up together, or one of them, are as long as hidden states, so that shapes do not tell."""


def first_experts(family: str, **changes) -> nn.Module:
    return next(iter(expert_modules(random_model(family, **changes)).values()))


def by_hand(module: nn.Module, expert: int, hidden: torch.Tensor) -> torch.Tensor:
    if "GptOss" in type(module).__name__:
        return module._apply_gate(hidden @ module.gate_up_proj[expert] + module.gate_up_proj_bias[expert])
    gate, up = F.linear(hidden, module.gate_up_proj[expert]).chunk(2, dim=-1)
    return module.act_fn(gate) * up


@torch.no_grad()
@pytest.mark.parametrize(
    "family, size", [*((name, None) for name in ("qwen3_moe", "gpt_oss", "mixtral", "deepseek_v3", "granitemoe")), *SQUARE]
)
def test_neurons_of_every_layout(family, size):
    changes = {} if size is None else {"intermediate_size": size}
    module = first_experts(family, **changes)
    generator = torch.Generator().manual_seed(1)
    for weight in module.parameters():  # biases are drawn as zeros
        weight.copy_(torch.randn(weight.shape, generator=generator) / 6)
    layout = neurons(module)
    hidden = torch.randn(5, 32, generator=generator)
    inner = by_hand(module, 2, hidden)
    assert layout.count == inner.shape[-1] == (size or layout.count)
    assert torch.equal(layout.inner(2, hidden), inner)
    kept = torch.arange(layout.count)[::3]
    cut = apply(alone(module, 2, **layout.keep(2, kept)), hidden)
    expected = inner[:, kept] @ layout.columns(2).T[kept] + layout.constant(2)
    torch.testing.assert_close(cut, expected, atol=1e-5, rtol=1e-4)
    bias = getattr(module, "down_proj_bias", None)
    assert torch.equal(layout.constant(2), torch.zeros(32) if bias is None else bias[2])


def test_experts_that_do_more_after_the_second_product_are_refused():
    class Squashed(type(first_experts("mixtral"))):
        def forward(self, hidden_states, top_k_index, top_k_weights):
            return super().forward(hidden_states, top_k_index, top_k_weights).tanh()

    module = first_experts("mixtral")
    module.__class__ = Squashed
    with pytest.raises(wb.UserError, match=r"inner neurons of Squashed \(gate_up_proj \(6, 96, 32\).* could not be told apart"):
        neurons(module)
