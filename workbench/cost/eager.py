"""Seconds eager PyTorch takes on a machine whose rates were measured: the work of a step, piece by piece, at those rates.

The pieces are those of a pre-norm decoder with rotary positions and a gated MLP, which most models are; a model that
differs (layer norm, learned positions) is a little cheaper than predicted.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.cost.flops import attention_flops, linear_flops
from workbench.cost.rates import Rates
from workbench.trace.anatomy import Anatomy, Layer, Linear

if TYPE_CHECKING:
    from workbench.trace.trace import Trace

_ENGINE_KERNELS = {"blockwise", "decode", "ragged"}
_RESIDUALS = 2
"""A layer adds its attention and its MLP to the stream."""


def eager_rows(trace: Trace, rates: Rates, experts: pd.DataFrame) -> pd.DataFrame:
    """One row a step, layer (-1: outside the layers) and component, with its `predicted_s`.

    `experts` holds `step, layer, tokens, hit`: tokens sent to experts, and how many experts were hit.
    """
    anatomy = trace.anatomy
    steps, attention = trace.table("steps"), trace.table("attention")
    work = _Work(rates, anatomy.num_parameters * anatomy.element_bytes, anatomy)
    tokens = steps["tokens"]
    parts = [
        _rows(steps, -1, "embedding", work.passing("copy", tokens * anatomy.hidden_size)),
        _rows(steps, -1, "norm", sum(work.passing("norm", tokens * norm) for norm in anatomy.final_norms)),
        _rows(steps, -1, "lm_head", work.product(steps["logits"], anatomy.lm_head)),
        _rows(steps, -1, "overhead", np.full(len(steps), rates.step_s)),
    ]
    for layer in anatomy.layers:
        calls = attention[attention["layer"] == layer.index]
        parts += _layer_rows(layer, calls, work)
        if layer.experts is not None:
            chosen = experts[experts["layer"] == layer.index]
            each = chosen["tokens"] / chosen["hit"]
            seconds = sum(chosen["hit"] * work.product(each, linear) for linear in layer.experts.linears)
            parts.append(_rows(chosen, layer.index, "experts", seconds))
    moved = trace.table("cache").query("op != 'score' and extra_bytes > 0")
    elements = moved["extra_bytes"] / (2 * anatomy.element_bytes)  # in and out
    parts.append(_rows(moved, moved["layer"], "cache", work.passing("copy", elements)))
    rows = pd.concat(parts, ignore_index=True)
    slowdown = rows["step"].map(pd.Series(rates.slowdown(tokens, anatomy.hidden_size), index=steps["step"]))
    rows["predicted_s"] *= slowdown.where(rows["component"] != "overhead", 1.0)
    return rows


class _Work:
    """Seconds of one operation at given rates."""

    def __init__(self, rates: Rates, weight_bytes: int, anatomy: Anatomy):
        self.rates, self.anatomy = rates, anatomy
        self._read_rate = rates.reads(weight_bytes)

    def product(self, rows, linear: Linear):
        """A linear layer: as fast as its shape allows, and no faster than its weights come in."""
        size = linear.in_features * linear.out_features
        computed = linear_flops(rows, linear) / self.rates.products(rows, linear.in_features, linear.out_features)
        return np.maximum(computed, size * self.anatomy.element_bytes / self._read_rate)

    def passing(self, kind: str, elements):
        """A pass over every element of a tensor."""
        return elements / self.rates.passes[kind](elements)

    def attention(self, calls: pd.DataFrame, layer: Layer) -> np.ndarray:
        """Attention calls of one layer, each at the rate of the kernel that ran."""
        head_dim = layer.attention.head_dim
        computed = calls["batch"] * calls["q_len"] * calls["kv_read"]
        kinds = np.array(
            [kind_of(*call) for call in zip(calls["kernel"], calls["mask"], calls["q_len"], strict=True)], dtype=object
        )
        seconds = np.zeros(len(calls))
        for kind in dict.fromkeys(kinds):
            chosen = kinds == kind
            of_kind = calls[chosen]
            pairs = computed[chosen] if kind in {"masked", "eager"} else of_kind["pairs"]
            size = of_kind["kv_read"] if kind in {"cached", "decode"} else of_kind["q_len"]
            seconds[chosen] = attention_flops(pairs, layer.attention) / self.rates.attention[kind](head_dim, size)
        return seconds


def kind_of(kernel: str, mask: str, q_len: int) -> str:
    """Which of `rates.ATTENTION` a recorded call was."""
    if kernel == "ragged":  # decode over the mean length; a call a kv head adds little
        return "decode"
    if kernel in _ENGINE_KERNELS or kernel == "eager":
        return kernel
    if q_len == 1:
        return "cached"
    return "causal" if "causal" in mask else "masked"


def _layer_rows(layer: Layer, calls: pd.DataFrame, work: _Work) -> list[pd.DataFrame]:
    tokens, attention = calls["batch"] * calls["q_len"], layer.attention
    parts = [_rows(calls, layer.index, "norm", sum(work.passing("norm", tokens * norm) for norm in layer.norms))]
    for component in dict.fromkeys(linear.component for linear in layer.linears):
        linears = [linear for linear in layer.linears if linear.component == component]
        parts += [_rows(calls, layer.index, component, work.product(tokens, each)) for each in linears if not each.per_key]
        keys = calls["batch"] * calls["kv_read"]
        parts += [_rows(calls, layer.index, component, work.product(keys, each)) for each in linears if each.per_key]
    rotated = tokens * (attention.num_q_heads + attention.num_kv_heads) * attention.head_dim
    passes = _RESIDUALS * work.passing("add", tokens * work.anatomy.hidden_size) + work.passing("rotary", rotated)
    activation = "gelu" if "gelu" in (work.anatomy.activation or "") else "silu"
    inner = [linear.in_features for linear in layer.linears if linear.component == "mlp"][-1:]
    if layer.experts is not None:
        inner.append(layer.experts.top_k * layer.experts.linears[-1].in_features)
    parts.append(
        _rows(calls, layer.index, "elementwise", passes + sum(work.passing(activation, tokens * size) for size in inner))
    )
    parts.append(_rows(calls, layer.index, "overhead", np.full(len(calls), work.rates.layer_s)))
    if len(calls):
        parts.append(_rows(calls, layer.index, "attention.scores", work.attention(calls, layer)))
        cached = calls[calls["kv_held"] > 0]
        # transformers' cache concatenates; the engine's store writes the new tokens only
        rows = np.where(cached["kernel"].isin(_ENGINE_KERNELS), cached["q_len"], cached["kv_read"])
        parts.append(
            _rows(cached, layer.index, "cache", work.passing("copy", cached["batch"] * rows * attention.cached_elements))
        )
    return parts


def _rows(source: pd.DataFrame, layer, component: str, seconds) -> pd.DataFrame:
    return pd.DataFrame(
        {"step": source["step"], "layer": layer, "component": component, "predicted_s": np.asarray(seconds, dtype=float)}
    )
