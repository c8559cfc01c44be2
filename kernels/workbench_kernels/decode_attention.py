"""Attention of one new query a row: `softmax(scaling * q k^T) v` with the G query heads of a kv head folded into rows.

Shapes: B batch, Hq query heads, H kv heads, G = Hq / H, N key slots, D head size, Dv value size. Folding `[B, Hq, 1, D]` into
`[B, H, G, D]` lets every key and value be read once, with no copy for the query heads that share it.

FLOPs: 2 B Hq N (D + Dv). Bytes: k and v once; q and the output besides.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F


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
