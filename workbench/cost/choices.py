"""What the table `choices` says of tokens side by side: the experts that neighbours share, were they in flight together. Pure.

A decode step of one row has one token in flight, a verification of t guessed tokens has t of the same text: how many experts
those hit tells what such a step would read, before any is run (as MoESD asks, arXiv 2505.19645).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from workbench.cost.routing import expected_unique, layer_kinds
from workbench.errors import UserError

if TYPE_CHECKING:
    from workbench.trace.trace import Trace


def choices(trace: Trace) -> pd.DataFrame:
    """The table `choices`, by step and position. Raises UserError if the trace has none, or its model no experts."""
    if all(layer.experts is None for layer in trace.anatomy.layers):
        raise UserError(f"{trace.anatomy.class_name} has no experts; look at a mixture of experts such as tiny-moe.")
    table = trace.table("choices")
    if table.empty:
        raise UserError('This trace has no choices by token; record it with routing="choices".')
    return table.sort_values(["step", "position"])


def experts_a_token(trace: Trace) -> pd.Series:
    """How many experts a token was really given, mean by layer: not the model's number where a method rules or drops some.

    From the table `choices` if there is one, else from the load and the tokens of each step.
    """
    table = trace.table("choices")
    if len(table):
        return table["experts"].map(lambda experts: (np.asarray(experts) >= 0).sum()).groupby(table["layer"]).mean()
    given = trace.table("routing").groupby(["step", "layer"], as_index=False)["tokens"].sum()
    given = given.merge(trace.table("steps")[["step", "tokens"]], on="step", suffixes=("", "_in_flight")).groupby("layer")
    return given["tokens"].sum() / given["tokens_in_flight"].sum()


def neighbours(trace: Trace, sizes: Sequence[int] | None = None) -> pd.DataFrame:
    """One row a layer and number of tokens: experts that so many tokens next to each other hit, mean over all such windows.

    Windows lie in one row of the batch and may span steps. `expected` is of independent, uniform choices of as many experts
    a token. `sizes` are powers
    of two as far as the text goes unless given. Raises UserError without the table `choices`, or for fewer than one token.
    """
    if sizes is not None and min(sizes, default=1) < 1:
        raise UserError(f"There are no windows of {min(sizes)} tokens; give 1 or more.")
    table = choices(trace)
    counts, given = layer_kinds(trace.anatomy).set_index("layer")["experts"], experts_a_token(trace)
    rows = []
    for layer, of_layer in table.groupby("layer"):
        count, top_k = counts[layer], given[layer]
        sums = [_running_sums(of_row["experts"].tolist(), count) for _, of_row in of_layer.groupby("row")]
        longest = max(map(len, sums)) - 1
        for size in sizes or [2**power for power in range(int(longest).bit_length())]:
            hit = [((each[size:] - each[:-size]) > 0).sum(1) for each in sums if len(each) > size]
            if hit:
                unique = float(np.concatenate(hit).mean())
                rows.append((layer, size, unique, float(expected_unique(size, count, top_k))))
    return pd.DataFrame(rows, columns=["layer", "tokens", "unique", "expected"])


def _running_sums(experts: list[Sequence[int]], count: int) -> np.ndarray:
    """`[tokens + 1, experts]` how often each expert was chosen before each token."""
    chosen = np.zeros((len(experts) + 1, count), dtype=np.int32)
    for number, of_token in enumerate(experts, start=1):
        chosen[number, [expert for expert in of_token if expert >= 0]] = 1
    return chosen.cumsum(0)
