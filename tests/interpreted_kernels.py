"""The Triton kernels' numbers on the CPU. Run by `test_triton.py` in a process of its own, with TRITON_INTERPRET=1.

Triton decides when it is imported whether it interprets, so this cannot share a process with the tests that compile.
"""

from __future__ import annotations

import pytest
import torch

from workbench_kernels.column_mass import column_mass_reference, launch_column_mass
from workbench_kernels.decode_attention import decode_attention, decode_attention_reference, launch_decode_attention
from workbench_kernels.ragged_decode_attention import launch_ragged_decode_attention, ragged_decode_attention_reference

# B, Hq, H, Q, N, D: odd lengths, one query, a past, MQA, GQA, MHA, head sizes that are no power of two
SIZES = [(1, 2, 2, 1, 1, 16), (2, 4, 2, 63, 63, 8), (1, 6, 1, 65, 130, 16), (1, 4, 4, 33, 100, 24), (1, 2, 1, 128, 128, 64)]


@pytest.fixture
def new_memory_is_nan(monkeypatch):
    """What a kernel does not write shows."""
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, **options: empty(*size, **options).fill_(torch.nan))


def tensors(size, seed=0):
    batch, num_q_heads, num_kv_heads, num_queries, num_slots, dim = size
    torch.manual_seed(seed)
    query = torch.randn(batch, num_q_heads, num_queries, dim)
    key = torch.randn(batch, num_kv_heads, num_slots, dim)
    occupied = torch.rand(batch, num_kv_heads, num_slots) < 0.7
    occupied[..., 0] = occupied[..., -num_queries:] = True
    asking = torch.rand(batch, num_queries) < 0.8
    return query, key, torch.randn(batch, num_kv_heads, num_slots, dim), occupied, asking


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("given", [(), ("window",), ("occupied",), ("asking",), ("window", "occupied", "asking")], ids=str)
def test_column_mass(new_memory_is_nan, size, given):
    query, key, _, occupied, asking = tensors(size)
    options = {"window": 9, "occupied": occupied, "asking": asking}
    options = {name: options[name] for name in given}
    if "window" in given:
        options.pop("occupied", None)  # a query's own slot is then the only one it surely sees
    expected = column_mass_reference(query, key, 0.2, **options)
    torch.testing.assert_close(launch_column_mass(query, key, 0.2, **options), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("size", [size for size in SIZES if size[3] > 1], ids=str)
def test_column_mass_with_a_known_log_sum_exp(new_memory_is_nan, size):
    query, key, _, _, _ = tensors(size)
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2) * 0.2
    past = key.shape[2] - query.shape[2]
    hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(past + 1)
    lse = scores.masked_fill(hidden, -torch.inf).logsumexp(-1)
    expected = column_mass_reference(query, key, 0.2)
    torch.testing.assert_close(launch_column_mass(query, key, 0.2, lse=lse), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    "size", [(1, 4, 4, 1, 5, 16), (2, 8, 2, 1, 130, 8), (1, 6, 1, 1, 700, 24), (1, 2, 1, 1, 1024, 64)], ids=str
)
@pytest.mark.parametrize("masked", [False, True])
def test_decode_attention(new_memory_is_nan, size, masked):
    query, key, value, occupied, _ = tensors(size)
    occupied = occupied if masked else None
    expected = decode_attention_reference(query, key, value, 0.2, occupied=occupied)
    # Keys as a view of a longer buffer, as the store hands them over.
    longer = torch.cat([key, torch.full_like(key, torch.nan)], 2)[:, :, : key.shape[2]]
    got = launch_decode_attention(query, longer, value, 0.2, occupied=occupied)
    for mine, reference in zip(got, expected, strict=True):
        torch.testing.assert_close(mine, reference, atol=1e-5, rtol=1e-5)
    plain = decode_attention(query, key, value, 0.2, occupied=occupied)
    torch.testing.assert_close(expected[0], plain, atol=1e-5, rtol=1e-5)
    assert expected[2].sum(-1).flatten().tolist() == pytest.approx(
        [1.0] * expected[2].shape[0] * expected[2].shape[1], abs=1e-4
    )


@pytest.mark.parametrize("lengths", [[1], [5, 1], [513, 2, 64, 1030], [17, 33, 700]], ids=str)
@pytest.mark.parametrize(("group", "dim", "value_dim"), [(1, 16, 16), (3, 24, 8), (4, 64, 64)])
def test_ragged_decode_attention(new_memory_is_nan, lengths, group, dim, value_dim):
    """Each head of its own length, with slots in reserve behind it that no one may read."""
    torch.manual_seed(0)
    reserve = 3
    starts = torch.tensor([0, *(length + reserve for length in lengths[:-1])]).cumsum(0)
    ends = starts + torch.tensor(lengths)
    key, value = (torch.full((int(ends[-1]) + reserve, size), torch.nan) for size in (dim, value_dim))
    for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
        key[start:end], value[start:end] = torch.randn(end - start, dim), torch.randn(end - start, value_dim)
    query = torch.randn(1, group * len(lengths), 1, dim)
    expected = ragged_decode_attention_reference(query, key, value, starts, ends, 0.2)
    got = launch_ragged_decode_attention(query, key, value, starts, ends, 0.2, longest=max(lengths))
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
