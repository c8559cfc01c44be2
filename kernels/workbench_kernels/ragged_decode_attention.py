"""Attention of one new query a row where each kv head holds a number of keys of its own, flattened one after another.

Shapes: B batch, Hq query heads, H kv heads, G = Hq / H, S flat slots, D head size, Dv value size. Head `b H + h` holds the
slots from `starts[b H + h]` up to, not including, `ends[b H + h]`, at least one; what lies between heads is not read.

The kernel: one program a kv head and stretch of its slots, with a running maximum (flash-decoding, Dao et al. 2023); the
stretches are put together by their log-sum-exp. A head that ends before a stretch leaves it at once.

FLOPs: 2 G n (D + Dv), n the sum of the lengths. Bytes: k and v of n slots once; q and the output besides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workbench_kernels.jit import jit, launches, tiles_for, tl, triton

STRETCH = 512
"""Slots one program reads, so that a long head fills the GPU."""


def ragged_decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
    *,
    longest: int,
) -> torch.Tensor:
    """Attention output `[B, Hq, 1, Dv]`.

    Args:
        query: `[B, Hq, 1, D]`, rotated.
        key: `[S, D]`, rotated.
        value: `[S, Dv]`.
        starts: `[B * H]` int64, the first slot of each head.
        ends: `[B * H]` int64, the slot after its last.
        scaling: factor on the scores.
        longest: slots of the longest head, so that a GPU need not be asked.
    """
    if launches(query, key, value):
        return launch_ragged_decode_attention(query, key, value, starts, ends, scaling, longest=longest)
    batch, num_q_heads, _, head_dim = query.shape
    folded = query.view(1, len(starts), -1, head_dim).split(1, 1)
    key, value = key[None, None], value[None, None]
    heads = [
        F.scaled_dot_product_attention(head, key[:, :, start:end], value[:, :, start:end], scale=scaling)
        for head, start, end in zip(folded, starts.tolist(), ends.tolist(), strict=True)
    ]
    return torch.cat(heads, 1).view(batch, num_q_heads, 1, -1)


def ragged_decode_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor, ends: torch.Tensor, scaling: float
) -> torch.Tensor:
    """The specification."""
    batch, num_q_heads, _, head_dim = query.shape
    folded = query.view(len(starts), -1, head_dim)
    heads = []
    for head, start, end in zip(folded, starts.tolist(), ends.tolist(), strict=True):
        rows = (head @ key[start:end].T).float().mul(scaling).softmax(-1)
        heads.append(rows.to(value.dtype) @ value[start:end])
    return torch.stack(heads).view(batch, num_q_heads, 1, -1)


def launch_ragged_decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    ends: torch.Tensor,
    scaling: float,
    *,
    longest: int,
) -> torch.Tensor:
    """Runs the kernel and puts the stretches together. Arguments as in `ragged_decode_attention`."""
    batch, num_q_heads, num_queries, head_dim = query.shape
    value_dim, group = value.shape[1], batch * num_q_heads // len(starts)
    assert num_queries == 1 and key.is_contiguous() and value.is_contiguous()
    tiles = tiles_for(max(head_dim, value_dim), query.element_size())
    stretches = triton.cdiv(longest, STRETCH)
    new = dict(dtype=torch.float32, device=query.device)
    part = torch.empty(stretches, batch, num_q_heads, value_dim, **new)
    part_lse = torch.empty(stretches, batch, num_q_heads, **new)
    _ragged_decode_attention_kernel[len(starts), stretches](
        query.contiguous(),
        key,
        value,
        starts,
        ends,
        part,
        part_lse,
        scaling,
        GROUP=group,
        GROUP_ROWS=max(16, 1 << (group - 1).bit_length()),
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        WIDTH=tiles.width,
        CHUNK=tiles.chunk,
        COLUMNS=tiles.rows,
        STRETCH=STRETCH,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    lse = part_lse.logsumexp(0)
    out = (part * (part_lse - lse).exp().unsqueeze(-1)).sum(0)
    return out.to(query.dtype).view(batch, num_q_heads, 1, value_dim)


@jit
def _ragged_decode_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    starts_ptr,
    ends_ptr,
    part_ptr,
    part_lse_ptr,
    scaling,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRETCH: tl.constexpr,
):
    kv_head = tl.program_id(0)  # batch x kv head
    stretch = tl.program_id(1)
    first = tl.load(starts_ptr + kv_head)
    length = (tl.load(ends_ptr + kv_head) - first).to(tl.int32)
    g = tl.arange(0, GROUP_ROWS)
    d = tl.arange(0, WIDTH)
    q_row = (kv_head * GROUP + g)[:, None] * HEAD_DIM
    highest = tl.full([GROUP_ROWS], -1e30, tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    out = tl.zeros([GROUP_ROWS, WIDTH], tl.float32)
    for start in range(stretch * STRETCH, tl.minimum(length, (stretch + 1) * STRETCH), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        held = j < length
        slot = (first + j)[:, None]
        scores = tl.zeros([GROUP_ROWS, COLUMNS], tl.float32)
        for chunk in tl.static_range(0, WIDTH, CHUNK):
            c = chunk + tl.arange(0, CHUNK)
            q = tl.load(query_ptr + q_row + c[None, :], mask=(g[:, None] < GROUP) & (c[None, :] < HEAD_DIM), other=0.0)
            k = tl.load(key_ptr + slot * HEAD_DIM + c[None, :], mask=held[:, None] & (c[None, :] < HEAD_DIM), other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision="tf32x3")
        v = tl.load(value_ptr + slot * VALUE_DIM + d[None, :], mask=held[:, None] & (d[None, :] < VALUE_DIM), other=0.0)
        scores = tl.where(held[None, :], scores * scaling, -1e30)
        above = tl.maximum(highest, tl.max(scores, 1))
        share = tl.where(held[None, :], tl.exp(scores - above[:, None]), 0.0)
        shrink = tl.exp(highest - above)
        total = total * shrink + tl.sum(share, 1)
        out = out * shrink[:, None] + tl.dot(share.to(v.dtype), v, input_precision="tf32x3")
        highest = above
    out = out / tl.maximum(total, 1e-37)[:, None]
    heads = tl.num_programs(0) * GROUP  # batch x query heads
    row = stretch * heads + kv_head * GROUP + g
    part_offset = row.to(tl.int64)[:, None] * VALUE_DIM + d[None, :]
    tl.store(part_ptr + part_offset, out, mask=(g[:, None] < GROUP) & (d[None, :] < VALUE_DIM))
    tl.store(part_lse_ptr + row, highest + tl.log(tl.maximum(total, 1e-37)), mask=g < GROUP)
