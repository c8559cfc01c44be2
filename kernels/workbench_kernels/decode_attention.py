"""Attention of one new query a row: `softmax(scaling * q k^T) v` with the G query heads of a kv head folded into rows.

Shapes: B batch, Hq query heads, H kv heads, G = Hq / H, N key slots, D head size, Dv value size. Folding `[B, Hq, 1, D]` into
`[B, H, G, D]` lets every key and value be read once, with no copy for the query heads that share it.

The kernel: one program a kv head and stretch of slots, with a running maximum (flash-decoding, Dao et al. 2023); the
stretches are put together by their log-sum-exp. The attention row, if asked for, is `exp(score - lse)`.

FLOPs: 2 B Hq N (D + Dv). Bytes: k and v once; q and the output besides, and the row if asked for.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

from workbench_kernels.attention_rows import attention_rows
from workbench_kernels.jit import jit, launches, tiles_for, tl, triton

STRETCH = 512
"""Slots one program reads, so that a long context fills the GPU."""


def decode_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    *,
    occupied: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention output `[B, Hq, 1, Dv]`.

    Args:
        query: `[B, Hq, 1, D]`, rotated.
        key: `[B, H, N, D]`, rotated.
        value: `[B, H, N, Dv]`.
        scaling: factor on the scores.
        occupied: `[B, H, N]` bool, False where a slot holds no token; None if all do.
    """
    batch, num_q_heads, _, head_dim = query.shape
    folded = query.view(batch, key.shape[1], -1, head_dim)
    mask = None if occupied is None else occupied[:, :, None]
    out = F.scaled_dot_product_attention(folded, key, value, attn_mask=mask, scale=scaling)
    return out.view(batch, num_q_heads, 1, -1)


def decode_attention_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    *,
    occupied: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Output `[B, Hq, 1, Dv]`, log-sum-exp `[B, Hq]` and attention row `[B, Hq, N]`, both float32, in one pass over k and v.

    Arguments as in `decode_attention`.
    """
    launch = launch_decode_attention if launches(query, key, value) else decode_attention_reference
    return launch(query, key, value, scaling, occupied=occupied)


def decode_attention_reference(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, *, occupied: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The specification."""
    batch, num_q_heads = query.shape[:2]
    rows = attention_rows(query, key, scaling, occupied=occupied).squeeze(3)  # [B, H, G, N]
    out = torch.matmul(rows.to(value.dtype), value).view(batch, num_q_heads, 1, -1)
    folded = query.view(batch, key.shape[1], -1, query.shape[3])
    scores = torch.matmul(folded, key.transpose(-1, -2)).float() * scaling
    if occupied is not None:
        scores = scores.masked_fill(~occupied[:, :, None], -torch.inf)
    return out, scores.logsumexp(-1).flatten(1), rows.flatten(1, 2)


def launch_decode_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scaling: float, *, occupied: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Runs the kernel and puts the stretches together."""
    batch, num_q_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_slots, value_dim = key.shape[1], key.shape[2], value.shape[3]
    assert num_queries == 1 and num_q_heads % num_kv_heads == 0
    group = num_q_heads // num_kv_heads
    tiles = tiles_for(max(head_dim, value_dim), query.element_size())
    stretches = triton.cdiv(num_slots, STRETCH)
    flags = torch.ones(1, dtype=torch.uint8, device=query.device)
    new = dict(dtype=torch.float32, device=query.device)
    part = torch.empty(stretches, batch, num_q_heads, value_dim, **new)
    part_lse = torch.empty(stretches, batch, num_q_heads, **new)
    scores = torch.empty(batch, num_q_heads, num_slots, **new)
    _decode_attention_kernel[batch * num_kv_heads, stretches](
        query.contiguous(),
        key,
        value,
        flags if occupied is None else occupied.to(torch.uint8).contiguous(),
        part,
        part_lse,
        scores,
        *(key.stride(0), key.stride(1), key.stride(2)),
        *(value.stride(0), value.stride(1), value.stride(2)),
        num_kv_heads,
        num_slots,
        scaling,
        GROUP=group,
        GROUP_ROWS=max(16, 1 << (group - 1).bit_length()),
        HEAD_DIM=head_dim,
        VALUE_DIM=value_dim,
        WIDTH=tiles.width,
        CHUNK=tiles.chunk,
        COLUMNS=tiles.rows,
        STRETCH=STRETCH,
        OCCUPIED=occupied is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    lse = part_lse.logsumexp(0)
    out = (part * (part_lse - lse).exp().unsqueeze(-1)).sum(0).to(query.dtype).view(batch, num_q_heads, 1, value_dim)
    return out, lse, (scores - lse.unsqueeze(-1)).exp()


@jit
def _decode_attention_kernel(
    query_ptr,
    key_ptr,
    value_ptr,
    occupied_ptr,
    part_ptr,
    part_lse_ptr,
    scores_ptr,
    k_stride_b,
    k_stride_h,
    k_stride_n,
    v_stride_b,
    v_stride_h,
    v_stride_n,
    num_kv_heads,
    num_slots,
    scaling,
    GROUP: tl.constexpr,
    GROUP_ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    COLUMNS: tl.constexpr,
    STRETCH: tl.constexpr,
    OCCUPIED: tl.constexpr,
):
    kv_head = tl.program_id(0)  # batch x kv head
    batch, h = kv_head // num_kv_heads, kv_head % num_kv_heads
    stretch = tl.program_id(1)
    g = tl.arange(0, GROUP_ROWS)
    d = tl.arange(0, WIDTH)
    q_row = (kv_head * GROUP + g)[:, None] * HEAD_DIM
    highest = tl.full([GROUP_ROWS], -1e30, tl.float32)
    total = tl.zeros([GROUP_ROWS], tl.float32)
    out = tl.zeros([GROUP_ROWS, WIDTH], tl.float32)
    k_base = key_ptr + batch.to(tl.int64) * k_stride_b + h * k_stride_h
    v_base = value_ptr + batch.to(tl.int64) * v_stride_b + h * v_stride_h
    for start in range(stretch * STRETCH, tl.minimum(num_slots, (stretch + 1) * STRETCH), COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        held = j < num_slots
        slot = j.to(tl.int64)[:, None]
        scores = tl.zeros([GROUP_ROWS, COLUMNS], tl.float32)
        for chunk in tl.static_range(0, WIDTH, CHUNK):
            c = chunk + tl.arange(0, CHUNK)
            q = tl.load(query_ptr + q_row + c[None, :], mask=(g[:, None] < GROUP) & (c[None, :] < HEAD_DIM), other=0.0)
            k = tl.load(k_base + slot * k_stride_n + c[None, :], mask=held[:, None] & (c[None, :] < HEAD_DIM), other=0.0)
            scores = tl.dot(q, tl.trans(k), scores, input_precision="tf32x3")
        v = tl.load(v_base + slot * v_stride_n + d[None, :], mask=held[:, None] & (d[None, :] < VALUE_DIM), other=0.0)
        if OCCUPIED:
            held = held & (tl.load(occupied_ptr + kv_head * num_slots + j, mask=j < num_slots, other=0) != 0)
        scores = tl.where(held[None, :], scores * scaling, -1e30)
        scores_offset = (kv_head * GROUP + g).to(tl.int64)[:, None] * num_slots + j[None, :]
        tl.store(scores_ptr + scores_offset, scores, mask=(g[:, None] < GROUP) & (j[None, :] < num_slots))
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
