"""Attention mass a key receives: the column sums of the attention matrix, without holding the matrix.

`mass[b, h, j] = sum over queries i of P[b, h, i, j]`. Shapes and masks as in `attention_rows`.

FLOPs: 2 B Hq Q N D, a second pass over q k^T. Bytes: k once per block of queries, q once, the mass once.
"""

from __future__ import annotations

import torch

from workbench_kernels.attention_rows import BLOCK, attention_rows


def column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    *,
    asking: torch.Tensor | None = None,
    **options,
) -> torch.Tensor:
    """Attention mass by key slot and query head, `[B, Hq, N]` float32.

    Args:
        query: `[B, Hq, Q, D]`.
        key: `[B, H, N, D]`.
        scaling: factor on the scores.
        asking: `[B, Q]` bool, False for queries that are padding and count for nothing; None if all count.
        options: `occupied`, `window`, `softcap` and `sinks` of `attention_rows`.
    """
    batch, num_q_heads, num_queries, _ = query.shape
    num_slots = key.shape[2]
    mass = torch.zeros(batch, num_q_heads, num_slots, dtype=torch.float32, device=query.device)
    occupied = options.pop("occupied", None)
    for start in range(0, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        last = num_slots - num_queries + stop
        rows = attention_rows(
            query[:, :, start:stop],
            key[:, :, :last],
            scaling,
            occupied=None if occupied is None else occupied[:, :, :last],
            **options,
        )
        if asking is not None:
            rows = rows * asking[:, None, None, start:stop, None]
        mass[:, :, :last] += rows.sum(3).flatten(1, 2)
    return mass


def column_mass_flops(batch: int, num_q_heads: int, num_queries: int, num_slots: int, head_dim: int) -> int:
    """FLOPs of the pass, counting every query against every slot."""
    return 2 * batch * num_q_heads * num_queries * num_slots * head_dim
