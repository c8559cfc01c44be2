"""Weights of FFNs: what a step reads of them, experts or not, and how many of them there are. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from workbench.trace.anatomy import Anatomy, Linear

if TYPE_CHECKING:
    from workbench.trace.trace import Trace

COMPONENTS = ("mlp", "experts")
"""The components that are an FFN: dense ones with what all tokens share of a mixture of experts, and routed experts."""


def weights_bytes(linears: Sequence[Linear], element_bytes: int) -> int:
    """Bytes of some weight matrices."""
    return element_bytes * sum(linear.in_features * linear.out_features for linear in linears)


def resident_bytes(anatomy: Anatomy) -> int:
    """Bytes of all FFN weights of a model."""
    size = anatomy.element_bytes
    dense = sum(weights_bytes(_dense(layer.linears), size) for layer in anatomy.layers)
    with_experts = [layer.experts for layer in anatomy.layers if layer.experts is not None]
    return dense + sum(experts.num_experts * weights_bytes(experts.linears, size) for experts in with_experts)


def read_bytes(trace: Trace) -> pd.DataFrame:
    """One row a step, layer and component (`mlp`, `experts`): `read_bytes` of weights, each once a step.

    Of a routing method it is what it says it read. Experts are read if a token is given to them.
    """
    anatomy, size = trace.anatomy, trace.anatomy.element_bytes
    steps = trace.table("attention")[["step", "layer"]].drop_duplicates()
    mlp = {layer.index: weights_bytes(_dense(layer.linears), size) for layer in anatomy.layers}
    dense = steps.assign(component="mlp", read_bytes=steps["layer"].map(mlp))
    expert = {layer.index: weights_bytes(layer.experts.linears, size) for layer in anatomy.layers if layer.experts is not None}
    routing = trace.table("routing")
    routing = routing[(routing["tokens"] > 0) & routing["layer"].isin(expert)]
    hit = routing.groupby(["step", "layer"], as_index=False)["expert"].count()
    experts = hit.assign(component="experts", read_bytes=hit["expert"] * hit["layer"].map(expert)).drop(columns="expert")
    keys = ["step", "layer", "component"]
    rows = pd.concat([dense[dense["read_bytes"] > 0], experts], ignore_index=True).astype({"read_bytes": "int64"})
    work = trace.table("work")
    work = work[work["weight_bytes"].notna() & work["component"].isin(COMPONENTS)]
    said = work[keys].assign(read_bytes=work["weight_bytes"].astype("int64"))
    own = rows[~pd.MultiIndex.from_frame(rows[keys]).isin(pd.MultiIndex.from_frame(said[keys]))]
    rows = pd.concat([own, said], ignore_index=True).merge(trace.table("steps")[["step", "phase"]], on="step")
    return rows[["step", "phase", "layer", "component", "read_bytes"]]


def _dense(linears: Sequence[Linear]) -> list[Linear]:
    return [linear for linear in linears if linear.component == "mlp"]
