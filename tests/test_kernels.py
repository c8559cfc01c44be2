"""Attention kernels against a whole eager attention matrix, over odd sizes and every mask."""

from __future__ import annotations

import math

import pytest
import torch

from workbench_kernels import attention_rows as rows_module
from workbench_kernels.attention_rows import attention_rows, blockwise_attention
from workbench_kernels.column_mass import column_mass, column_mass_flops
from workbench_kernels.decode_attention import decode_attention
from workbench_kernels.ragged_decode_attention import ragged_decode_attention, ragged_decode_attention_reference

SIZES = [(1, 4, 4, 5, 5, 8), (2, 4, 2, 1, 37, 8), (1, 6, 1, 33, 70, 16), (3, 4, 2, 63, 63, 8), (1, 2, 2, 100, 131, 4)]


def eager(query, key, scaling, occupied=None, window=None, softcap=None, sinks=None):
    """The whole matrix `[B, Hq, Q, N]`, entry by entry from the definition."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(-1, -2) * scaling
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    num_queries, num_slots = scores.shape[-2:]
    for i in range(num_queries):
        own = num_slots - num_queries + i
        for j in range(num_slots):
            if j > own or (window and j <= own - window):
                scores[..., i, j] = -math.inf
    if occupied is not None:
        scores = scores.masked_fill(~occupied.repeat_interleave(group, 1)[:, :, None], -math.inf)
    if sinks is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
        return scores.softmax(-1)[..., :-1]
    return scores.softmax(-1)


@pytest.fixture(params=SIZES, ids=lambda size: "B{}-Hq{}-H{}-Q{}-N{}-D{}".format(*size))
def tensors(request):
    batch, num_q_heads, num_kv_heads, num_queries, num_slots, dim = request.param
    torch.manual_seed(0)
    query = torch.randn(batch, num_q_heads, num_queries, dim)
    key, value = torch.randn(batch, num_kv_heads, num_slots, dim), torch.randn(batch, num_kv_heads, num_slots, dim)
    occupied = torch.rand(batch, num_kv_heads, num_slots) < 0.8
    occupied[..., 0] = occupied[..., -num_queries:] = True
    return query, key, value, occupied


OPTIONS = [{}, {"window": 7}, {"softcap": 2.0}, {"sinks": True}, {"occupied": True}, {"occupied": True, "softcap": 1.0}]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: "-".join(options) or "plain")
@pytest.mark.parametrize("block", [16, 256])
def test_equal_to_eager(tensors, options, block, monkeypatch):
    query, key, value, occupied = tensors
    options = dict(options)
    if "sinks" in options:
        options["sinks"] = torch.linspace(-1, 1, query.shape[1])
    if "occupied" in options:
        options["occupied"] = occupied
    expected = eager(query, key, 0.3, **options)
    torch.testing.assert_close(attention_rows(query, key, 0.3, **options).flatten(1, 2), expected, atol=1e-6, rtol=1e-5)
    monkeypatch.setattr(rows_module, "BLOCK", block)
    monkeypatch.setattr("workbench_kernels.column_mass.BLOCK", block)
    torch.testing.assert_close(column_mass(query, key, 0.3, **options), expected.sum(2), atol=1e-5, rtol=1e-5)
    out = blockwise_attention(query, key, value, 0.3, **options)
    group = query.shape[1] // key.shape[1]
    torch.testing.assert_close(out, expected @ value.repeat_interleave(group, 1), atol=1e-5, rtol=1e-5)
    if query.shape[2] == 1 and not options.keys() - {"occupied"}:
        torch.testing.assert_close(decode_attention(query, key, value, 0.3, **options), out, atol=1e-5, rtol=1e-5)


def test_padding_queries_give_no_mass(tensors):
    query, key, _, _ = tensors
    asking = torch.ones(query.shape[0], query.shape[2], dtype=torch.bool)
    asking[:, 0] = False
    expected = eager(query, key, 0.3)[:, :, 1:].sum(2)
    torch.testing.assert_close(column_mass(query, key, 0.3, asking=asking), expected, atol=1e-5, rtol=1e-5)


def test_flops():
    # 2 rows x 4 heads x 3 queries x 5 slots x 8, a multiply-add is 2: 2 * 2 * 4 * 3 * 5 * 8
    assert column_mass_flops(2, 4, 3, 5, 8) == 1920


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("lengths", [[1, 9], [70, 3], [5, 5]], ids=str)
def test_ragged_decode_equals_eager_over_each_head(batch, lengths):
    """Heads of a length each, two rows, three query heads a kv head, and slots in reserve that are not numbers."""
    torch.manual_seed(0)
    lengths = [length + row for row in range(batch) for length in lengths]
    starts = torch.tensor([0, *(length + 2 for length in lengths[:-1])]).cumsum(0)
    ends = starts + torch.tensor(lengths)
    flat = torch.full((2, int(ends[-1]) + 2, 8), torch.nan)
    keys, values = ([torch.randn(1, 1, length, 8) for length in lengths] for _ in range(2))
    for head, (start, end) in enumerate(zip(starts.tolist(), ends.tolist(), strict=True)):
        flat[0, start:end], flat[1, start:end] = keys[head][0, 0], values[head][0, 0]
    query = torch.randn(batch, 6, 1, 8)
    heads = query.view(-1, 1, 3, 1, 8)
    each = [eager(q, k, 0.3) @ v for q, k, v in zip(heads, keys, values, strict=True)]
    expected = torch.stack(each).view(batch, 6, 1, 8)
    got = ragged_decode_attention(query, *flat, starts, ends, 0.3, longest=max(lengths))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    reference = ragged_decode_attention_reference(query, *flat, starts, ends, 0.3)
    torch.testing.assert_close(reference, expected, atol=1e-5, rtol=1e-5)
