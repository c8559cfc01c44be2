"""Attention mass a key receives: the column sums of the attention matrix, without holding the matrix.

`mass[b, h, j] = sum over queries i of exp(s_ij - lse_i)`, with `s = scaling * q k^T` and `lse_i` the log-sum-exp of row i over
the keys query i sees. Shapes and masks as in `attention_rows`.

The kernels: one program a block of queries finds `lse` with a running maximum; then one program a block of keys adds up the
probabilities of all queries that see it, so no two programs write to the same place.

FLOPs: 2 B Hq Q N D for the sums and as much again for `lse` if it is not given. Bytes: q once a block of keys and k once a
block of queries.
"""

from __future__ import annotations

import torch

from workbench_kernels.attention_rows import BLOCK, attention_rows
from workbench_kernels.jit import jit, launches, tiles_for, tl, triton

_SCORES_AT_ONCE = 2**19
"""Scores the reference holds at once, over all heads: 2 MiB, which stay in a processor's cache between the passes."""


def column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    *,
    lse: torch.Tensor | None = None,
    asking: torch.Tensor | None = None,
    occupied: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention mass by key slot and query head, `[B, Hq, N]` float32.

    Args:
        query: `[B, Hq, Q, D]`.
        key: `[B, H, N, D]`.
        scaling: factor on the scores.
        lse: `[B, Hq, Q]` float32 log-sum-exp of each row, if an attention kernel has left it; the reference does not need it.
        asking: `[B, Q]` bool, False for queries that are padding and count for nothing; None if all count.
        occupied: as in `attention_rows`.
        window: as in `attention_rows`.
        softcap: as in `attention_rows`.
        sinks: as in `attention_rows`.
    """
    if sinks is None and softcap is None and launches(query, key):
        return launch_column_mass(query, key, scaling, lse=lse, asking=asking, occupied=occupied, window=window)
    options = {"window": window, "softcap": softcap, "sinks": sinks}
    if query.shape[2] == 1:
        row = attention_rows(query, key, scaling, occupied=occupied, **options).flatten(1, 3)
        return row if asking is None else row * asking[:, None]
    return column_mass_reference(query, key, scaling, asking=asking, occupied=occupied, **options)


def column_mass_reference(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    *,
    asking: torch.Tensor | None = None,
    occupied: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The specification, in blocks of queries: one block's rows are all that is ever held, and under a window a block reads
    only what it can see.
    """
    batch, num_q_heads, num_queries, _ = query.shape
    num_kv_heads, num_slots = key.shape[1], key.shape[2]
    seen = num_slots if window is None else min(num_slots, window + BLOCK)
    block = min(max(_SCORES_AT_ONCE // (batch * num_q_heads * seen), 16), BLOCK)
    mass = torch.zeros(batch, num_kv_heads, num_q_heads // num_kv_heads, num_slots, dtype=torch.float32, device=query.device)
    ones = torch.ones(batch, num_queries, dtype=torch.float32, device=query.device)
    counts = (ones if asking is None else ones * asking)[:, None, None, None]
    for start in range(0, num_queries, block):
        stop = min(start + block, num_queries)
        last = num_slots - num_queries + stop
        first = 0 if window is None else max(0, last - (stop - start) - window + 1)
        rows = attention_rows(
            query[:, :, start:stop],
            key[:, :, first:last],
            scaling,
            occupied=None if occupied is None else occupied[:, :, first:last],
            window=window,
            softcap=softcap,
            sinks=sinks,
        )
        mass[..., first:last] += torch.matmul(counts[..., start:stop], rows).squeeze(-2)
    return mass.flatten(1, 2)


def launch_column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    *,
    lse: torch.Tensor | None = None,
    asking: torch.Tensor | None = None,
    occupied: torch.Tensor | None = None,
    window: int | None = None,
) -> torch.Tensor:
    """Runs the kernels. Arguments as in `column_mass`."""
    batch, num_q_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_slots = key.shape[1], key.shape[2]
    assert key.shape[3] == head_dim and num_slots >= num_queries and num_q_heads % num_kv_heads == 0
    query, key = query.contiguous(), key.contiguous()
    flags = torch.ones(1, dtype=torch.uint8, device=query.device)
    occupied_flags = flags if occupied is None else occupied.to(torch.uint8).contiguous()
    asking_flags = flags if asking is None else asking.to(torch.uint8).contiguous()
    tiles = tiles_for(head_dim, query.element_size())
    shape = (num_q_heads, num_q_heads // num_kv_heads, num_queries, num_slots, scaling, window or num_slots)
    constants = dict(
        HEAD_DIM=head_dim,
        WIDTH=tiles.width,
        CHUNK=tiles.chunk,
        ROWS=tiles.rows,
        COLUMNS=tiles.rows,
        OCCUPIED=occupied is not None,
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if lse is None:
        lse = torch.empty(batch, num_q_heads, num_queries, dtype=torch.float32, device=query.device)
        grid = (batch * num_q_heads, triton.cdiv(num_queries, tiles.rows))
        _row_lse_kernel[grid](query, key, occupied_flags, lse, *shape, **constants)
    mass = torch.empty(batch, num_q_heads, num_slots, dtype=torch.float32, device=query.device)
    tensors = (query, key, occupied_flags, asking_flags, lse.contiguous(), mass)
    grid = (batch * num_q_heads, triton.cdiv(num_slots, tiles.rows))
    _column_mass_kernel[grid](*tensors, *shape, **constants, ASKING=asking is not None)
    return mass


def column_mass_flops(batch: int, num_q_heads: int, num_queries: int, num_slots: int, head_dim: int) -> int:
    """FLOPs of the pass, counting every query against every slot."""
    return 2 * batch * num_q_heads * num_queries * num_slots * head_dim


@jit
def _score_tile(
    query_ptr,
    key_ptr,
    q_row,
    k_row,
    q_there,
    k_there,
    scaling,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    scores = tl.zeros([ROWS, COLUMNS], tl.float32)
    for chunk in tl.static_range(0, WIDTH, CHUNK):
        d = (chunk + tl.arange(0, CHUNK))[None, :]
        q = tl.load(query_ptr + q_row[:, None] * HEAD_DIM + d, mask=q_there[:, None] & (d < HEAD_DIM), other=0.0)
        k = tl.load(key_ptr + k_row[:, None] * HEAD_DIM + d, mask=k_there[:, None] & (d < HEAD_DIM), other=0.0)
        scores = tl.dot(q, tl.trans(k), scores, input_precision="tf32x3")
    return scores * scaling


@jit
def _row_lse_kernel(
    query_ptr,
    key_ptr,
    occupied_ptr,
    lse_ptr,
    num_q_heads,
    group,
    num_queries,
    num_slots,
    scaling,
    window,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OCCUPIED: tl.constexpr,
):
    head = tl.program_id(0)  # batch x query head
    kv_head = (head // num_q_heads) * (num_q_heads // group) + (head % num_q_heads) // group
    i = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    own = num_slots - num_queries + i  # slot of query i
    q_row = (head * num_queries + i).to(tl.int64)
    highest = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    last = tl.minimum(num_slots, num_slots - num_queries + (tl.program_id(1) + 1) * ROWS)
    first = tl.maximum(0, num_slots - num_queries + tl.program_id(1) * ROWS - window + 1) // COLUMNS * COLUMNS
    for start in range(first, last, COLUMNS):
        j = start + tl.arange(0, COLUMNS)
        k_row = (kv_head * num_slots + j).to(tl.int64)
        scores = _score_tile(
            query_ptr, key_ptr, q_row, k_row, i < num_queries, j < num_slots, scaling, HEAD_DIM, WIDTH, CHUNK, ROWS, COLUMNS
        )
        seen = (j[None, :] <= own[:, None]) & (j[None, :] > own[:, None] - window) & (j[None, :] < num_slots)
        if OCCUPIED:
            flag = tl.load(occupied_ptr + kv_head * num_slots + j, mask=j < num_slots, other=0)
            seen = seen & (flag[None, :] != 0)
        scores = tl.where(seen, scores, -1e30)
        above = tl.maximum(highest, tl.max(scores, 1))
        total = total * tl.exp(highest - above) + tl.sum(tl.where(seen, tl.exp(scores - above[:, None]), 0.0), 1)
        highest = above
    lse = highest + tl.log(tl.maximum(total, 1e-37))
    tl.store(lse_ptr + head * num_queries + i, lse, mask=i < num_queries)


@jit
def _column_mass_kernel(
    query_ptr,
    key_ptr,
    occupied_ptr,
    asking_ptr,
    lse_ptr,
    mass_ptr,
    num_q_heads,
    group,
    num_queries,
    num_slots,
    scaling,
    window,
    HEAD_DIM: tl.constexpr,
    WIDTH: tl.constexpr,
    CHUNK: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    OCCUPIED: tl.constexpr,
    ASKING: tl.constexpr,
):
    head = tl.program_id(0)  # batch x query head
    row = head // num_q_heads
    kv_head = row * (num_q_heads // group) + (head % num_q_heads) // group
    j = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    k_row = (kv_head * num_slots + j).to(tl.int64)
    held = j < num_slots
    if OCCUPIED:
        held = held & (tl.load(occupied_ptr + kv_head * num_slots + j, mask=j < num_slots, other=0) != 0)
    mass = tl.zeros([COLUMNS], tl.float32)
    past = num_slots - num_queries
    first = tl.maximum(0, tl.program_id(1) * COLUMNS - past) // ROWS * ROWS
    last = tl.minimum(num_queries, (tl.program_id(1) + 1) * COLUMNS - past + window - 1)
    for start in range(first, last, ROWS):
        i = start + tl.arange(0, ROWS)
        own = past + i
        q_row = (head * num_queries + i).to(tl.int64)
        lse = tl.load(lse_ptr + head * num_queries + i, mask=i < num_queries, other=0.0)
        scores = _score_tile(
            query_ptr, key_ptr, q_row, k_row, i < num_queries, j < num_slots, scaling, HEAD_DIM, WIDTH, CHUNK, ROWS, COLUMNS
        )
        seen = (j[None, :] <= own[:, None]) & (j[None, :] > own[:, None] - window) & held[None, :] & (i[:, None] < num_queries)
        if ASKING:
            seen = seen & (tl.load(asking_ptr + row * num_queries + i, mask=i < num_queries, other=0) != 0)[:, None]
        mass += tl.sum(tl.where(seen, tl.exp(scores - lse[:, None]), 0.0), 0)
    tl.store(mass_ptr + head * num_slots + j, mass, mask=j < num_slots)
