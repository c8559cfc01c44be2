"""Bytes moved between memory and the processor, modelled from a trace's counts. Never mixed with measured bytes.

`eager`: operands in + results out of every operation, as the framework runs them one by one with eager attention and experts
in a loop; what the model's own code does is in the trace as polynomials (`workbench.trace.traffic`).
`fused`: what a good kernel must move: weights once a forward, K and V once per kv head and pass, experts only if hit.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.cost.flops import alike, attention_counts, by_slot, grouped, with_steps
from workbench.errors import UserError
from workbench.trace.anatomy import Anatomy, Attention, Layer, Linear
from workbench.trace.traffic import expert_terms, regime, terms

if TYPE_CHECKING:
    from workbench.trace.trace import Trace

MODELS = ("eager", "fused")
ON_CHIP_BYTES = 192 * 1024
"""Fast memory a fused attention kernel may use per block: about what one SM of an A100 or H100 offers."""

_INDEX_BYTES = 8


def linear_bytes(tokens, linear: Linear, element_bytes: int):
    """Input, weight, bias and output of one matrix product."""
    weight = linear.in_features * linear.out_features + (linear.out_features if linear.bias else 0)
    return element_bytes * (tokens * (linear.in_features + linear.out_features) + weight)


def norm_bytes(tokens, size: int, element_bytes: int):
    """Input, weight and output of one normalisation as a single operation."""
    return element_bytes * (2 * tokens * size + size)


def embedding_bytes(tokens, hidden_size: int, element_bytes: int):
    """Token ids in, one row of the table each in and out."""
    return tokens * (2 * hidden_size * element_bytes + _INDEX_BYTES)


def fused_attention_bytes(batch, q_len, kv_read, attention: Attention, element_bytes: int, on_chip_bytes: int = ON_CHIP_BYTES):
    """FlashAttention-2 order: Q and the output once, K and V once per kv head and pass over a block of queries.

    A block holds `M / (2 D)` query rows (M = on-chip elements; the G query heads of a kv head share a pass), so K and V
    are read `passes = ceil(G q_len / block)` times; a causal prefill skips the blocks above the diagonal, a factor
    `(1 + 1/passes) / 2`, and a sliding window those before it: a pass reads the window and its own tokens.
    Source: I/O complexity of attention, arXiv 2402.07443, with FlashAttention-2's block rule.
    """
    block = max(1, on_chip_bytes // element_bytes // (2 * attention.head_dim))
    rows = np.asarray(q_len) * attention.group
    passes = -(-rows // block)
    new_only = np.asarray(q_len) == np.asarray(kv_read)
    share = np.where(new_only, (1 + 1 / passes) / 2, 1.0)
    slots = np.asarray(kv_read) * share
    if attention.window is not None:
        slots = np.minimum(slots, attention.window + -(-block // attention.group))
    key_value = attention.num_kv_heads * slots * (attention.head_dim + attention.value_dim)
    q_and_out = attention.num_q_heads * np.asarray(q_len) * (attention.head_dim + attention.value_dim)
    return (element_bytes * np.asarray(batch) * (q_and_out + np.rint(key_value * passes))).astype(np.int64)


def cache_append_bytes(batch, q_len, attention: Attention, element_bytes: int):
    """New K and V in, and out into the cache."""
    return 2 * element_bytes * batch * q_len * attention.cached_elements


def bytes_rows(trace: Trace, model: str = "fused", on_chip_bytes: int = ON_CHIP_BYTES) -> pd.DataFrame:
    """One row a step, layer (-1: outside the layers) and component, with its `bytes`."""
    if model not in MODELS:
        raise UserError(f"There is no byte model {model!r}; the models are {' and '.join(MODELS)}.")
    if on_chip_bytes < 1:
        raise UserError(f"A kernel cannot use {on_chip_bytes} on-chip bytes; give 1 or more.")
    steps = trace.table("steps")
    parts = _eager_rows(trace, steps) if model == "eager" else _fused_rows(trace, steps, on_chip_bytes)
    if model == "eager" and trace.table("work")["bytes"].notna().any():
        raise UserError("The eager bytes of what a routing method computes are not known; use model='fused'.")
    cache, by_cache = trace.table("cache"), []
    scoring = cache["op"] == "score"
    for component, chosen in (("method", cache[scoring]), ("cache", cache[~scoring])):
        moved = chosen[chosen["extra_bytes"] > 0]
        by_cache.append(_rows(moved, moved["layer"], component, moved["extra_bytes"]))
    return with_steps(by_slot(parts, by_cache, trace, "bytes"), steps)


def trace_bytes(
    trace: Trace, by: str | Sequence[str] | None, model: str, on_chip_bytes: int = ON_CHIP_BYTES
) -> int | pd.DataFrame:
    """Total bytes, or a frame grouped by any of `GROUPS`."""
    return grouped(bytes_rows(trace, model, on_chip_bytes), "bytes", by)


def _eager_rows(trace: Trace, steps: pd.DataFrame) -> list[pd.DataFrame]:
    traffic = trace.meta.get("eager_traffic", {"reason": "the run that wrote this trace did not come to its end"})
    if "reason" in traffic:
        raise UserError(f"The eager bytes of this trace are not known ({traffic['reason']}); use model='fused'.")
    attention = attention_counts(trace)
    parts = []
    kinds = [regime(row.phase, row.batch, row.tokens, row.padding_mask) for row in steps.itertuples()]
    for kind, of_kind in steps.groupby(np.array(kinds, dtype=object), sort=False):
        calls = attention[attention["step"].isin(of_kind["step"])]
        for scope, component, coefficients in traffic["regimes"][kind]:
            if scope in ("outside", "head"):
                tokens = of_kind["logits" if scope == "head" else "tokens"] // of_kind["batch"]
                values = terms(of_kind["batch"], tokens, of_kind["context"])
                parts.append(_rows(of_kind, -1, component, values @ coefficients))
                continue
            alike = [layer for layer, first in enumerate(traffic["same_as"]) if first == scope]
            chosen = calls[calls["layer"].isin(alike)]
            if component == "cache":
                chosen = chosen[chosen["kv_held"] > 0]
            values = terms(chosen["batch"], chosen["q_len"], chosen["kv_read"])
            parts.append(_rows(chosen, chosen["layer"], component, values @ coefficients))
    return parts + _eager_expert_rows(trace, steps, traffic)


def _eager_expert_rows(trace: Trace, steps: pd.DataFrame, traffic: dict) -> list[pd.DataFrame]:
    routing = trace.table("routing")
    hits = routing[routing["tokens"] > 0].groupby(["step", "layer"], as_index=False)["expert"].count()
    hits = hits.merge(steps[["step", "tokens"]], on="step")
    parts = []
    for layer, rows in hits.groupby("layer"):
        values = expert_terms(rows["tokens"], rows["expert"])
        parts.append(_rows(rows, layer, "experts", values @ traffic["experts"][str(traffic["same_as"][layer])]))
    return parts


def _fused_rows(trace: Trace, steps: pd.DataFrame, on_chip_bytes: int) -> list[pd.DataFrame]:
    anatomy = trace.anatomy
    attention = attention_counts(trace)
    parts = _outside_layers(steps, anatomy)
    for layer, indices in alike(anatomy):
        parts += _layer_rows(layer, attention[attention["layer"].isin(indices)], anatomy, on_chip_bytes)
    return parts + _expert_rows(trace)


def _outside_layers(steps: pd.DataFrame, anatomy: Anatomy) -> list[pd.DataFrame]:
    size = anatomy.element_bytes
    tokens = steps["tokens"]
    return [
        _rows(steps, -1, "embedding", embedding_bytes(tokens, anatomy.hidden_size, size)),
        _rows(steps, -1, "norm", sum(norm_bytes(tokens, norm, size) for norm in anatomy.final_norms)),
        _rows(steps, -1, "lm_head", linear_bytes(steps["logits"], anatomy.lm_head, size)),
    ]


def _layer_rows(layer: Layer, calls: pd.DataFrame, anatomy: Anatomy, on_chip_bytes: int) -> list[pd.DataFrame]:
    size = anatomy.element_bytes
    tokens = calls["batch"] * calls["q_len"]
    parts = [_rows(calls, calls["layer"], "norm", sum(norm_bytes(tokens, norm, size) for norm in layer.norms))]
    for component in dict.fromkeys(linear.component for linear in layer.linears):
        linears = [linear for linear in layer.linears if linear.component == component]
        moved = sum(linear_bytes(tokens, linear, size) for linear in linears if not linear.per_key)
        parts.append(_rows(calls, calls["layer"], component, moved))
        expanded = [linear for linear in linears if linear.per_key]
        if expanded:
            moved = sum(linear_bytes(calls["batch"] * calls["kv_read"], linear, size) for linear in expanded)
            parts.append(_rows(calls, calls["layer"], component, moved))
    if len(calls):
        sizes = (calls["batch"], calls["q_len"], calls["kv_read"])
        moved = fused_attention_bytes(*sizes, layer.attention, size, on_chip_bytes)
        parts.append(_rows(calls, calls["layer"], "attention.scores", moved))
        cached = calls[calls["kv_held"] > 0]
        appended = cache_append_bytes(cached["batch"], cached["q_len"], layer.attention, size)
        parts.append(_rows(cached, cached["layer"], "cache", appended))
    return parts


def _expert_rows(trace: Trace) -> list[pd.DataFrame]:
    """Every expert that was hit moves its weights once a forward, and its tokens' activations."""
    routing = trace.table("routing")
    size = trace.anatomy.element_bytes
    parts = []
    for layer in trace.anatomy.layers:
        if layer.experts is None:
            continue
        hit = routing[(routing["layer"] == layer.index) & (routing["tokens"] > 0)]
        moved = sum(linear_bytes(hit["tokens"], linear, size) for linear in layer.experts.linears)
        parts.append(_rows(hit, layer.index, "experts", moved))
    return parts


def _rows(source: pd.DataFrame, layer, component: str, moved) -> pd.DataFrame:
    return pd.DataFrame(
        {"step": source["step"], "layer": layer, "component": component, "bytes": np.asarray(moved, dtype=np.int64)}
    )
