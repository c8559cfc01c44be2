"""FLOPs of matrix products, computed from a trace's counts and the model's anatomy.

One multiply-add is 2 FLOPs. Norms, activations and softmax are not counted, as in torch's own counter; nor are rotary
angles, which older transformers made by a small matrix product. Two conventions: `full` counts every query against
every key that is read, as an unmasked kernel and torch's counter do; `causal` counts the pairs the mask lets through.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.errors import UserError
from workbench.trace.anatomy import Anatomy, Attention, Layer, Linear
from workbench.trace.schema import DRAFT

if TYPE_CHECKING:
    from workbench.trace.trace import Trace

CONVENTIONS = ("full", "causal")
COMPONENTS = (
    "embedding",
    "norm",
    "attention.qkv",
    "attention.scores",
    "attention.out",
    "mlp",
    "router",
    "experts",
    "lm_head",
    "elementwise",
    "cache",
    "method",
    "unattributed",
)
GROUPS = ("phase", "component", "step", "layer", "setup", "slot")
"""What sums may be taken by. The slot is that of the method whose work it is: `cache`, `routing`, `decoding`, or `model`."""


def linear_flops(tokens: int, linear: Linear) -> int:
    """`tokens x in_features @ in_features x out_features`; adding a bias is free, as in torch's counter."""
    return 2 * tokens * linear.in_features * linear.out_features


def attention_flops(pairs: int, attention: Attention) -> int:
    """Scores (head_dim products a pair) and weighted values (value_dim), for every query head."""
    return 2 * pairs * attention.num_q_heads * (attention.head_dim + attention.value_dim)


def flops_rows(trace: Trace, convention: str = "full") -> pd.DataFrame:
    """One row a step, layer (-1: outside the layers) and component, with its `flops`."""
    if convention not in CONVENTIONS:
        raise UserError(f"There is no FLOP convention {convention!r}; the conventions are {' and '.join(CONVENTIONS)}.")
    anatomy = trace.anatomy
    steps = trace.table("steps")
    attention = attention_counts(trace)
    parts = [_rows(steps, -1, "lm_head", linear_flops(steps["logits"], anatomy.lm_head))]
    for layer, indices in alike(anatomy):
        of_layer = attention[attention["layer"].isin(indices)]
        tokens = of_layer["batch"] * of_layer["q_len"]  # a layer may be left out of a forward call, or run twice
        keys = of_layer["batch"] * of_layer["kv_read"]
        for component in dict.fromkeys(linear.component for linear in layer.linears):
            linears = [linear for linear in layer.linears if linear.component == component]
            a_token = sum(linear_flops(1, linear) for linear in linears if not linear.per_key)
            a_key = sum(linear_flops(1, linear) for linear in linears if linear.per_key)
            parts.append(_rows(of_layer, of_layer["layer"], component, a_token * tokens))
            if a_key:
                parts.append(_rows(of_layer, of_layer["layer"], component, a_key * keys))
        full = of_layer["batch"] * of_layer["q_len"] * of_layer["kv_read"]
        pairs = full if convention == "full" else of_layer["pairs"]
        parts.append(_rows(of_layer, of_layer["layer"], "attention.scores", attention_flops(pairs, layer.attention)))
    parts += _expert_rows(trace)
    unattributed = trace.table("unattributed")
    parts.append(_rows(unattributed, -1, "unattributed", unattributed["flops"]))
    cache = trace.table("cache")
    scored = cache[cache["extra_flops"] > 0]
    by_cache = [_rows(scored, scored["layer"], "method", scored["extra_flops"])]
    return with_steps(by_slot(parts, by_cache, trace, "flops"), steps)


def trace_flops(trace: Trace, by: str | Sequence[str] | None, convention: str) -> int | pd.DataFrame:
    """Total FLOPs, or a frame grouped by any of `GROUPS`."""
    return grouped(flops_rows(trace, convention), "flops", by)


def grouped(rows: pd.DataFrame, column: str, by: str | Sequence[str] | None) -> int | pd.DataFrame:
    """The sum of a column, or its sums by group. Raises UserError for a group that does not exist."""
    if by is None:
        return int(rows[column].sum())
    names = [by] if isinstance(by, str) else list(by)
    unknown = [name for name in names if name not in GROUPS]
    if unknown:
        raise UserError(f"Cannot group by {unknown[0]!r}; choose among {', '.join(GROUPS)}.")
    sums = rows.groupby(names, sort=False, as_index=False, dropna=False, observed=True)[column].sum()
    kinds = {name: sums[name].dtype for name in names}
    return sums.astype({name: kind.categories.dtype for name, kind in kinds.items() if isinstance(kind, pd.CategoricalDtype)})


def alike(anatomy: Anatomy) -> list[tuple[Layer, list[int]]]:
    """The layers by kind, those of one kind counted together: one of them, and the indices of all."""
    kinds: dict[Layer, list[int]] = {}
    for layer in anatomy.layers:
        kinds.setdefault(replace(layer, index=0), []).append(layer.index)
    return [(anatomy.layers[indices[0]], indices) for indices in kinds.values()]


def attention_counts(trace: Trace) -> pd.DataFrame:
    """The table of attention without its texts, which take most of the time to cut a long trace into layers."""
    table = trace.arrow("attention")
    return table.drop_columns(["kernel", "mask"]).to_pandas()


def by_slot(model: list[pd.DataFrame], cache: list[pd.DataFrame], trace: Trace, column: str) -> pd.DataFrame:
    """Rows of the model's own work, of a cache method's, a routing and a decoding method's as one, which is whose in `slot`.

    Rows of the model that such a method's work stands in for are left out. What is done in a draft, or by another model, is a
    decoding method's.
    """
    work = trace.table("work")
    work = work[work[column].notna()].astype({column: "int64"})
    own = pd.concat(model, ignore_index=True)
    if len(work):
        keys = ["step", "layer", "component"]
        own = own[~pd.MultiIndex.from_frame(own[keys]).isin(pd.MultiIndex.from_frame(work[keys]))]
    steps = trace.table("steps")
    decoding = work["step"].isin(steps.loc[steps["phase"] == DRAFT, "step"]) | (work["layer"] < 0)
    work = work[["step", "layer", "component", column]]
    parts = {"model": own, "cache": pd.concat(cache), "routing": work[~decoding], "decoding": work[decoding]}
    codes = np.repeat(np.arange(len(parts), dtype=np.int8), [len(part) for part in parts.values()])
    rows = pd.concat([part for part in parts.values() if len(part)] or [own], ignore_index=True)
    return rows.assign(slot=pd.Categorical.from_codes(codes, categories=list(parts)))


def with_steps(rows: pd.DataFrame, steps: pd.DataFrame) -> pd.DataFrame:
    """The rows with phase and setup of their step, as categories: a long trace has millions of rows and few of either."""
    named = steps[["step", "phase", "setup"]].astype({"phase": "category", "setup": "category"})
    numbers = pd.Index(steps["step"])
    if not numbers.is_unique:  # several runs as one
        return rows.merge(named, on="step")
    place = numbers.get_indexer(rows["step"])
    known, place = rows.loc[place >= 0], place[place >= 0]
    return known.assign(phase=named["phase"].array.take(place), setup=named["setup"].array.take(place))


def _expert_rows(trace: Trace) -> list[pd.DataFrame]:
    routing = trace.table("routing")
    parts = []
    for layer in trace.anatomy.layers:
        if layer.experts is None:
            continue
        tokens = routing[routing["layer"] == layer.index].groupby("step", as_index=False)["tokens"].sum()
        a_token = sum(linear_flops(1, linear) for linear in layer.experts.linears)
        parts.append(_rows(tokens, layer.index, "experts", a_token * tokens["tokens"]))
    return parts


def _rows(source: pd.DataFrame, layer, component: str, flops) -> pd.DataFrame:
    return pd.DataFrame(
        {"step": source["step"], "layer": layer, "component": component, "flops": np.asarray(flops, dtype=np.int64)}
    )
