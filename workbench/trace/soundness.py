"""Whether a trace that came from elsewhere makes sense, before anything is computed or drawn from it.

That its files are whole and have the right types is seen when they are opened; here it is what they say. A trace that this
package wrote passes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from workbench.errors import UserError
from workbench.trace.anatomy import Anatomy
from workbench.trace.schema import PHASES, TABLES
from workbench.trace.trace import Trace

_ALWAYS_THERE = {
    "step",
    "row",
    "batch",
    "tokens",
    "layer",
    "phase",
    "position",
    "start",
    "length",
    "window",
    "q_len",
    "kv_read",
}
"""Columns that hold a value in every row."""

_MOST = {"position": 2**24, "start": 2**24, "length": 2**24, "batch": 2**20, "row": 2**20, "head": 2**14}
"""The most a number may be that decides how large a figure's arrays are."""
_LARGEST = 2**62
_LARGEST_MAP = 2**28
"""Layers times positions: maps hold a number for each."""
_MOST_EXPERTS = 4096
"""Of a layer; figures hold a number for each pair."""
_NONE_IS_MINUS_ONE = {
    ("spans", "layer"),
    ("evictions", "head"),
    ("evictions", "into"),
    ("importance", "head"),
    ("work", "layer"),
}
_SIZES = 2**48


def checked(trace: Trace) -> Trace:
    """The trace, if what it says makes sense. Raises UserError naming the file or table that does not."""
    try:
        _check_meta(trace.meta)
        anatomy = _anatomy(trace.meta)
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError, RecursionError):
        raise UserError("The trace's meta.json does not say what a trace's does; record the trace again.") from None
    for name in TABLES:
        _check_table(name, trace.arrow(name), anatomy.num_layers)
    for name in ("routing", "choices"):
        _check_experts(name, trace.arrow(name), anatomy)
    steps = trace.arrow("steps")
    if pc.count_distinct(steps["step"]).as_py() != steps.num_rows:
        raise UserError("The trace's table 'steps' has a step more than once; record the trace again.")
    unknown = sorted(set(pc.unique(steps["phase"]).to_pylist()) - set(PHASES))
    if unknown:
        raise UserError(f"The trace's table 'steps' has a phase {unknown[0][:40]!r}; the phases are {', '.join(PHASES)}.")
    return trace


def _check_meta(meta: dict[str, Any]) -> None:
    """Raises one of the errors `checked` knows if an entry that is read is of another kind."""
    texts = [meta.get("setup", ""), *meta.get("notes", []), *(change["to"] for change in meta.get("swaps", []))]
    lists = [meta.get(name, []) for name in ("notes", "swaps", "unfinished_steps")]
    if not all(isinstance(text, str) for text in texts) or not all(isinstance(each, list) for each in lists):
        raise TypeError


def _anatomy(meta: dict[str, Any]) -> Anatomy:
    """The anatomy; raises one of those errors if a name is no text or a size no sensible number."""
    anatomy = Anatomy.from_dict(meta["anatomy"])
    names: list[Any] = [anatomy.class_name, anatomy.model_type, anatomy.dtype]
    sizes: list[Any] = [anatomy.element_bytes, anatomy.hidden_size, anatomy.vocab_size, anatomy.num_parameters]
    sizes += anatomy.final_norms
    linears = [anatomy.lm_head]
    for place, layer in enumerate(anatomy.layers):
        attention = layer.attention
        sizes += [attention.num_q_heads, attention.num_kv_heads, attention.head_dim, attention.value_dim, *layer.norms]
        sizes += [size for size in (attention.window, attention.latent_dim) if size is not None]
        linears += layer.linears
        if layer.experts is not None:
            sizes += [layer.experts.num_experts, layer.experts.top_k]
            linears += layer.experts.linears
            if layer.experts.num_experts > _MOST_EXPERTS or layer.experts.top_k > layer.experts.num_experts:
                raise ValueError
        if layer.index != place or attention.num_q_heads % attention.num_kv_heads:
            raise ValueError
    for linear in linears:
        names.append(linear.component)
        sizes += [linear.in_features, linear.out_features]
    if not anatomy.layers or not all(isinstance(name, str) for name in names):
        raise TypeError
    if not all(type(size) is int and 0 < size < _SIZES for size in sizes):
        raise ValueError
    return anatomy


def _check_table(name: str, table: pa.Table, num_layers: int) -> None:
    for field in table.schema:
        column = table[field.name]
        if column.null_count and field.name in _ALWAYS_THERE:
            raise UserError(f"The trace's table {name!r} lacks values in {field.name!r}; record the trace again.")
        if not pa.types.is_integer(field.type) or column.null_count == len(column):
            continue
        ends = pc.min_max(column).as_py()
        least = -1 if (name, field.name) in _NONE_IS_MINUS_ONE else -_LARGEST if field.name.endswith("_ns") else 0
        most = num_layers - 1 if field.name == "layer" else _MOST.get(field.name, _LARGEST)
        if field.name in {"position", "start", "length"}:
            most = min(most, _LARGEST_MAP // num_layers)
        wrong = [number for number in (ends["min"], ends["max"]) if not least <= number <= most]
        if wrong:
            raise UserError(f"The trace's table {name!r} says {field.name} {wrong[0]}, which cannot be; record it again.")


def _check_experts(name: str, table: pa.Table, anatomy: Anatomy) -> None:
    """Raises UserError if an expert is named that its layer does not have, or not as many of them as of their weights."""
    counts = np.array([0 if layer.experts is None else layer.experts.num_experts for layer in anatomy.layers])
    column = "expert" if name == "routing" else "experts"
    layers, experts = table["layer"].to_numpy(), table[column].combine_chunks()
    least = 0
    if name == "choices":
        least, lengths = -1, pc.list_value_length(experts).to_numpy(zero_copy_only=False)
        weights = pc.list_value_length(table["weights"]).to_numpy()
        if not np.array_equal(lengths, weights) or (lengths == 0).any():  # null, which is not equal to itself, included
            raise UserError("The trace's table 'choices' lacks experts or weights of tokens; record the trace again.")
        logits = pc.list_value_length(table["logits"]).drop_null().to_numpy()
        if not np.array_equal(logits, counts[layers[table["logits"].is_valid().to_numpy()]]):
            raise UserError("The trace's table 'choices' has not one logit an expert; record the trace again.")
        layers, experts = layers.repeat(lengths.astype(int)), experts.flatten()
    numbers = experts.to_numpy(zero_copy_only=False)
    wrong = numbers[~((numbers >= least) & (numbers < counts[layers]))]
    if len(wrong):
        raise UserError(f"The trace's table {name!r} says {column} {wrong[0]}, which cannot be; record it again.")
