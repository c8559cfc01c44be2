"""How many query-key pairs a causal mask lets through."""

from __future__ import annotations


def causal_pairs(num_queries: int, num_slots: int, window: int | None = None) -> int:
    """Pairs the causal mask lets through when the queries are the last of `num_slots` tokens, each seeing `window`."""
    first = num_slots - num_queries + 1
    if window is None or num_slots <= window:
        return num_queries * (first + num_slots) // 2
    growing = max(0, window - first)
    return growing * (first + first + growing - 1) // 2 + (num_queries - growing) * window
