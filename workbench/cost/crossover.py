"""From which context on a cache method pays: predicted seconds of the same run under each method, over the context.

A method reads less at every decode step and pays for it in scoring, most of all at the end of the prompt. Both are modelled:
a planned run under the method (`under_method`), priced as any other (`roofline`). Layers that are alike, in the model and under
the method, are priced once.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from workbench.cost.hardware import ELEMENT_BYTES, Hardware
from workbench.cost.hardware import hardware as sheet
from workbench.cost.plan import Plan
from workbench.cost.roofline import dtype_of, layer_seconds
from workbench.cost.under_method import LayerCosts, Says, under
from workbench.errors import UserError
from workbench.trace.anatomy import Anatomy
from workbench.trace.schema import TABLES
from workbench.trace.trace import Trace

DENSE = "dense"
_STEPS = 17
"""Decode steps that are priced of each run, each for a stretch of them: seconds grow evenly within one."""
_FINER = 8
"""Into how many parts a stretch of contexts is cut where a method begins to pay within it."""
_CLOSE = 1.02


@dataclass(frozen=True)
class CrossOver:
    """Predicted seconds of one run by method and context. Nothing in it is measured."""

    about: dict[str, Any]
    """Model, hardware, dtype, batch and new tokens."""
    table: pd.DataFrame
    """One row a method and context: `method, context, prefill_s, step_s, total_s, kv_bytes`.

    `step_s` is the mean decode step; `kv_bytes` what the cache holds at the last one.
    """
    pays: dict[str, tuple[tuple[int, int], ...]]
    """By method, the stretches of contexts, first and last, where its total is below that of dense; ends are right to 2%.

    A stretch that begins at the shortest context or ends at the longest may go on beyond it.
    """

    def sentence(self, method: str) -> str:
        """What was found of a method, for people."""
        rows, dense = (self.table[self.table["method"] == name].set_index("context") for name in (method, DENSE))
        shortest, longest = int(rows.index.min()), int(rows.index.max())
        total, step = (dense[column][longest] / rows[column][longest] for column in ("total_s", "step_s"))
        there = f"at {longest:,} tokens the whole run is {total:.2f} times as fast as dense, a decode step {step:.2f} times"
        new = f"with {self.about['new_tokens']:,} new tokens"
        if not self.pays[method]:
            return f"{method} does not pay at any context shown, {new}: {there}."
        parts = [_stretch(*ends, shortest, longest) for ends in self.pays[method]]
        return f"{method} pays {' and '.join(parts)}, {new}: {there}."


def _stretch(first: int, last: int, shortest: int, longest: int) -> str:
    if (first, last) == (shortest, longest):
        return "at every context shown"
    if last == longest:
        return f"from about {first:,} tokens on"
    return f"up to about {last:,} tokens" if first == shortest else f"from about {first:,} to about {last:,} tokens"


def crossover(
    anatomy: Anatomy,
    hardware: str | Path | Hardware,
    methods: Mapping[str, Says],
    *,
    contexts: Sequence[int],
    dtype: str | None = None,
    batch: int = 1,
    new_tokens: int = 128,
) -> CrossOver:
    """Predicts a run at several contexts, densely and under each method.

    Args:
        anatomy: the model (`wb.anatomy`).
        hardware: a sheet, as for `predict`.
        methods: by label, what each says of a run (`workbench.experiments.planned`); `dense` is always there.
        contexts: prompt tokens a row, two or more different ones.
        dtype: as for `predict`.
        batch: rows.
        new_tokens: decode steps, one or more.

    Raises:
        UserError: for fewer contexts or new tokens, and for a sheet, dtype or size that does not exist.
    """
    wanted = sorted(set(contexts))
    if len(wanted) < 2:
        raise UserError(f"Cannot look for a cross-over at contexts {list(contexts)}; give two or more different ones.")
    if new_tokens < 1:
        raise UserError(f"Cannot predict decoding of {new_tokens} new tokens; ask for 1 or more.")
    device = sheet(hardware)
    chosen = dtype_of(anatomy, device, dtype)
    sized = replace(anatomy, dtype=chosen, element_bytes=ELEMENT_BYTES[chosen])

    def seconds(says: Says | None, at: Sequence[int]) -> pd.DataFrame:
        return _seconds([Plan(sized, batch, context, new_tokens, _STEPS) for context in at], device, chosen, says)

    given = {DENSE: None, **methods}
    frames = {label: seconds(says, wanted) for label, says in given.items()}
    pays = {
        label: _pays(frames[label], frames[DENSE], lambda at, says=says: _faster(at, says, seconds))
        for label, says in methods.items()
    }
    table = pd.concat([frame.assign(method=label) for label, frame in frames.items()], ignore_index=True)
    about = {
        "model": anatomy.class_name,
        "hardware": device.label,
        "dtype": chosen,
        "batch": batch,
        "new_tokens": new_tokens,
        "measured_rates": chosen in device.rates,
    }
    return CrossOver(about, table[["method", "context", "prefill_s", "step_s", "total_s", "kv_bytes"]], pays)


def _pays(
    frame: pd.DataFrame, dense: pd.DataFrame, faster: Callable[[Sequence[int]], list[bool]]
) -> tuple[tuple[int, int], ...]:
    """The stretches of contexts where a total is below that of dense."""
    contexts = frame["context"].tolist()
    below = (frame["total_s"] < dense["total_s"]).tolist()
    stretches = []
    for pays, group in itertools.groupby(range(len(contexts)), key=lambda place: below[place]):
        if not pays:
            continue
        first, *_, last = [*group] * 2
        start = contexts[first] if first == 0 else _end(contexts[first], contexts[first - 1], faster)
        stop = contexts[last] if last == len(contexts) - 1 else _end(contexts[last], contexts[last + 1], faster)
        stretches.append((start, stop))
    return tuple(stretches)


def _end(inside: int, outside: int, faster: Callable[[Sequence[int]], list[bool]]) -> int:
    """The last context on the way from one that pays to one that does not that still pays, found by cutting finer and finer."""
    while max(inside, outside) > max(min(inside, outside) + 1, min(inside, outside) * _CLOSE):
        between = [round(context) for context in np.geomspace(inside, outside, _FINER + 1)]
        between = list(dict.fromkeys([inside, *between[1:-1], outside]))
        paying = [True, *faster(between[1:-1]), False]
        place = paying.index(False)
        inside, outside = between[place - 1], between[place]
    return inside


def _faster(at: Sequence[int], says: Says, seconds: Callable[[Says | None, Sequence[int]], pd.DataFrame]) -> list[bool]:
    """Whether a method's total is below that of dense at some contexts."""
    return [] if not at else (seconds(says, at)["total_s"] < seconds(None, at)["total_s"]).tolist()


def _seconds(plans: Sequence[Plan], device: Hardware, dtype: str, says: Says | None) -> pd.DataFrame:
    """One row a plan: `context, prefill_s, step_s, total_s, kv_bytes`. All plans are priced as the steps of one trace."""
    seen = [plan.seen for plan in plans]
    costs = [{} if says is None else says(plan.anatomy, plan.context, after) for plan, after in zip(plans, seen, strict=True)]
    few, counts = _kinds(plans[0].anatomy, costs)
    traces, repeats, experts, owners, kv = [], [], [], [], []
    offset = 0
    for plan, of_plan in zip(plans, costs, strict=True):
        shrunk = replace(plan, anatomy=few)
        trace, repeat = shrunk.trace()
        trace = under(trace, {layer.index: of_plan[layer.index] for layer in few.layers if layer.index in of_plan})
        kv.append(_kv_bytes(trace, counts))
        experts.append(shrunk.experts(trace).assign(step=lambda rows, offset=offset: rows["step"] + offset))
        repeats.append(repeat.rename(lambda step, offset=offset: step + offset))
        owners += [plan.context] * len(repeat)
        traces.append((trace, offset))
        offset += len(repeat)
    rows = layer_seconds(_one(traces), device, dtype, pd.concat(experts, ignore_index=True))
    weight = rows["layer"].map(counts).fillna(1) * rows["step"].map(pd.concat(repeats))
    context = rows["step"].map(dict(enumerate(owners)))
    prefill = rows["step"].isin([first for _, first in traces])
    spent = (rows["predicted_s"] * weight).groupby([context, prefill]).sum().unstack(fill_value=0.0)
    spent = spent.loc[[plan.context for plan in plans]]
    frame = pd.DataFrame({"context": spent.index, "prefill_s": spent[True].to_numpy(), "decode_s": spent[False].to_numpy()})
    frame["step_s"] = frame.pop("decode_s") / plans[0].new_tokens
    frame["total_s"] = frame["prefill_s"] + frame["step_s"] * plans[0].new_tokens
    return frame.assign(kv_bytes=kv)


def _kinds(anatomy: Anatomy, costs: Sequence[Mapping[int, LayerCosts]]) -> tuple[Anatomy, dict[int, int]]:
    """The anatomy with one layer of each kind, and how many there are of each, by the index of the one."""
    counts: dict[tuple, list[int]] = {}
    for layer in anatomy.layers:
        kind = (replace(layer, index=0), tuple(each.get(layer.index) for each in costs))
        counts.setdefault(kind, []).append(layer.index)
    firsts = {indices[0]: len(indices) for indices in counts.values()}
    return replace(anatomy, layers=tuple(layer for layer in anatomy.layers if layer.index in firsts)), firsts


def _kv_bytes(trace: Trace, counts: Mapping[int, int]) -> int:
    """Bytes of K and V held at the last step, in all layers."""
    anatomy, attention = trace.anatomy, trace.table("attention")
    last = attention[attention["step"] == attention["step"].max()].set_index("layer")
    elements = sum(
        int(last["batch"][layer.index] * last["kv_held"][layer.index]) * layer.attention.cached_elements * counts[layer.index]
        for layer in anatomy.layers
    )
    return elements * anatomy.element_bytes


def _one(traces: Sequence[tuple[Trace, int]]) -> Trace:
    """Traces of one anatomy as one, the steps of each counted from a number on."""
    tables = {}
    for name, schema in TABLES.items():
        parts = []
        for trace, offset in traces:
            table = trace.arrow(name)
            if "step" in schema.names and table.num_rows:
                table = table.set_column(0, schema.field("step"), pa.array(table["step"].to_numpy() + offset))
            parts.append(table)
        tables[name] = pa.concat_tables(parts)
    return Trace(traces[0][0].meta, tables)
