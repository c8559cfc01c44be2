"""Rows of the attention matrix: `P = softmax(scaling * q k^T)` over the keys each query may see.

Shapes: B batch, Hq query heads, H kv heads, G = Hq / H, Q queries, N key slots, D head size.

The N slots hold the keys in the order they were appended, so the Q queries belong to the last Q slots: query i sees
slot j when `j <= N - Q + i`, when slot j holds a token, and, under a window of W, when `j > N - Q + i - W`. Query head h
belongs to kv head h // G; folding G into the query rows reads every key once per kv head.

FLOPs: 2 B Hq Q N D (every slot is multiplied, then masked). Bytes: q and k once, P written in float32.
"""

from __future__ import annotations

import torch

BLOCK = 256
"""Queries handled at once, so that no Q x N matrix is ever whole in memory."""


def attention_rows(
    query: torch.Tensor,
    key: torch.Tensor,
    scaling: float,
    *,
    occupied: torch.Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """The attention rows of all queries, `[B, H, G, Q, N]` float32.

    Args:
        query: `[B, Hq, Q, D]`, rotated.
        key: `[B, H, N, D]`, rotated, N >= Q.
        scaling: factor on the scores.
        occupied: `[B, H, N]` bool, False where a slot holds no token; None if all do.
        window: tokens a query sees, itself included; None for all.
        softcap: `softcap * tanh(score / softcap)`, Gemma 2's bound on scores.
        sinks: `[Hq]`, a learned logit per head that takes part in the softmax and is then dropped (GPT-OSS).
    """
    batch, num_q_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_slots = key.shape[1], key.shape[2]
    group = num_q_heads // num_kv_heads
    folded = query.reshape(batch * num_kv_heads, group * num_queries, head_dim)
    flat = key.reshape(batch * num_kv_heads, num_slots, head_dim)
    scores = torch.baddbmm(query.new_empty(1, 1, 1), folded, flat.transpose(-1, -2), beta=0, alpha=scaling).float()
    scores = scores.view(batch, num_kv_heads, group, num_queries, num_slots)
    if softcap is not None:
        scores.div_(softcap).tanh_().mul_(softcap)
    lowest = torch.finfo(scores.dtype).min
    if num_queries > 1 or window is not None:
        _hide(scores, window, lowest)
    if occupied is not None:
        scores.masked_fill_(~occupied[:, :, None, None], lowest)
    if sinks is None:
        return scores.softmax(-1)
    extra = sinks.float().view(1, num_kv_heads, group, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-1]


def _hide(scores: torch.Tensor, window: int | None, lowest: float) -> None:
    """Sets the scores that queries may not see, which lie in two corners: later tokens, and those before the window."""
    num_queries, num_slots = scores.shape[-2:]
    query = torch.arange(num_queries, device=scores.device)[:, None]
    if num_queries > 1:
        scores[..., -num_queries:].masked_fill_(query < query.T, lowest)
    if window is not None and num_slots > window:
        before = num_slots - window  # the last query sees no slot before this one
        slot = torch.arange(before, device=scores.device)
        scores[..., :before].masked_fill_(slot <= query + before - num_queries, lowest)


def blockwise_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scaling: float,
    *,
    occupied: torch.Tensor | None = None,
    window: int | None = None,
    **options,
) -> torch.Tensor:
    """Attention output `[B, Hq, Q, Dv]`, in blocks of queries; under a window a block reads only what it can see.

    Args:
        query: `[B, Hq, Q, D]`.
        key: `[B, H, N, D]`.
        value: `[B, H, N, Dv]`.
        scaling: factor on the scores.
        occupied: as in `attention_rows`.
        window: as in `attention_rows`.
        options: `softcap` and `sinks` of `attention_rows`.
    """
    batch, num_q_heads, num_queries, _ = query.shape
    num_kv_heads, num_slots = key.shape[1], key.shape[2]
    blocks = []
    for start in range(0, num_queries, BLOCK):
        stop = min(start + BLOCK, num_queries)
        last = num_slots - num_queries + stop
        first = 0 if window is None else max(0, last - (stop - start) - window + 1)
        rows = attention_rows(
            query[:, :, start:stop],
            key[:, :, first:last],
            scaling,
            window=window,
            occupied=None if occupied is None else occupied[:, :, first:last],
            **options,
        )
        weights = rows.to(value.dtype).view(batch, num_kv_heads, -1, last - first)
        blocks.append(torch.matmul(weights, value[:, :, first:last]).view(batch, num_q_heads, stop - start, -1))
    return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 2)
