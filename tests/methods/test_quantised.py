"""Expert weights in few bits: bytes are real, errors bounded by the grid, nested bits nest, in every family's layout."""

from __future__ import annotations

import pytest
import torch

import workbench as wb
from workbench.engine.experts import OwnBank
from workbench.methods.routing.quantised import (
    PackedExpert,
    experts_of,
    input_is_last,
    nested,
    packed,
    rounded,
    signs,
    unpacked,
)
from workbench.testing import random_model


@pytest.fixture
def matrix() -> torch.Tensor:
    """37 columns: groups of 16, 16 and 5, and five bits over in the last byte."""
    return torch.randn(6, 37, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("count", [1, 8, 13])
def test_bits_are_packed_eight_a_byte_and_come_back(count):
    bits = torch.randint(0, 2, (3, count), generator=torch.Generator().manual_seed(count))
    assert packed(bits).nbytes == 3 * -(-count // 8) and torch.equal(unpacked(packed(bits), count), bits)
    assert packed(torch.tensor([[1, 0, 1, 0, 0, 0, 0, 1, 1]])).tolist() == [[0b10000101, 1]]


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_is_off_by_half_a_step_at_most(matrix, bits):
    found = rounded(matrix, bits, 16)
    assert found.planes.shape == (bits, 6, 5) and found.nbytes == bits * 6 * 5 + 2 * (6 * 3 * 2)
    assert found.codes().min() >= 0 and found.codes().max() <= 2**bits - 1
    step = found.scale.float().repeat_interleave(16, 1)[:, :37]
    # the zero point and half-precision scales move the ends of the range by up to half a step more
    assert ((found.dense() - matrix).abs() <= 1.01 * step).all()
    assert ((found.dense() - matrix).abs() <= 0.51 * step).float().mean() > 0.9
    assert torch.equal(rounded(torch.zeros(2, 20), bits, 16).dense(), torch.zeros(2, 20))


def test_codes_by_hand():
    # range -1 to 2 in 4 steps: scale 1, zero point 1, codes 0 1 2 3
    found = rounded(torch.tensor([[-1.0, 0.0, 1.0, 2.0]]), 2, 4)
    assert found.codes().tolist() == [[0, 1, 2, 3]] and found.dense().tolist() == [[-1, 0, 1, 2]]


def test_one_bit_is_the_mean_magnitude_of_each_group(matrix):
    found = signs(matrix, 16).dense()
    for start, stop in ((0, 16), (16, 32), (32, 37)):
        expected = matrix[:, start:stop].sign() * matrix[:, start:stop].abs().mean(-1, keepdim=True)
        torch.testing.assert_close(found[:, start:stop], expected, atol=1e-3, rtol=1e-3)


def test_nested_bits_nest(matrix):
    """The error falls with every plane, and fewer planes are the first of more."""
    parts = nested(matrix, 2, 4, 16)
    sums = torch.stack([part.dense() for part in parts]).cumsum(0)
    errors = (matrix - sums).norm(dim=(1, 2)).tolist()
    assert errors == sorted(errors, reverse=True) and errors[3] < 0.5 * errors[0]
    for level in (1, 2, 3):
        fewer = nested(matrix, 2, level, 16)
        assert torch.equal(sum(part.dense() for part in fewer), sums[level - 1])
    rest = matrix - sums[0]
    assert torch.equal(sums[1], sums[0] + signs(rest, 16).dense())


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_an_expert_in_many_bits_computes_what_it_did(family, tiny):
    """Eight bits and four sign planes leave next to nothing; biases stay as they are."""
    lm = wb.load((random_model(family), tiny.tokenizer))
    _, module, experts = next(experts_of(lm.model, lm.anatomy))
    assert input_is_last(module, 32) is (family != "gpt_oss")
    for name, parameter in module.named_parameters():
        torch.nn.init.normal_(parameter, std=0.3)
        assert parameter.ndim == 3 or "bias" in name
    hidden = torch.randn(5, 32)
    own, expert = OwnBank(module, experts, 4), PackedExpert(module, 2, 32, lambda weights: nested(weights, 8, 5, 16))
    with torch.no_grad():
        expected = own.compute(2, hidden)
        torch.testing.assert_close(expert.compute(hidden), expected, atol=2e-3 * expected.abs().max().item(), rtol=0)
        assert (expert.compute(hidden, 1) - expected).norm() > (expert.compute(hidden) - expected).norm()
    weights = sum(linear.in_features * linear.out_features for linear in experts.linears)
    assert expert.nbytes(1) < expert.nbytes() and expert.nbytes() >= (8 + 4) * weights / 8
