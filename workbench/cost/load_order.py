"""In which order the bit planes of a step's experts should be loaded, so that computing waits least. Pure.

Hottest-expert-bit-first (D2MoE, arXiv 2504.15299): each expert has a queue of the planes its tokens asked for, lowest bits
first; of all queue heads the one that most tokens compute with is loaded next. A plane is computed once it is there and the
one before it is done: `C_s = max(L_s, C_{s-1}) + tokens * seconds a token`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pandas as pd

from workbench.errors import UserError

if TYPE_CHECKING:
    from workbench.trace.trace import Trace


@dataclass(frozen=True)
class Plane:
    """One bit plane of an expert that is asked for in a step."""

    expert: int
    bits: int
    """The width it completes."""
    tokens: int
    """Those that compute with it."""
    num_bytes: int


@dataclass(frozen=True)
class Timeline:
    """What an order of loading comes to, in seconds."""

    makespan_s: float
    """Until all is computed."""
    idle_s: float
    """Computing waited for loading."""
    load_s: float
    """All loading."""
    compute_s: float
    """All computing."""


def by_number(planes: Sequence[Plane]) -> list[Plane]:
    """One expert after the other, each from its lowest bits on."""
    return sorted(planes, key=lambda plane: (plane.expert, plane.bits))


def hottest_first(planes: Sequence[Plane]) -> list[Plane]:
    """Of the lowest plane left of each expert always the one of most tokens; among equals the expert of lowest number."""
    queues: dict[int, list[Plane]] = {}
    for plane in reversed(by_number(planes)):
        queues.setdefault(plane.expert, []).append(plane)
    order = []
    while queues:
        hottest = max(sorted(queues), key=lambda expert: queues[expert][-1].tokens)
        order.append(queues[hottest].pop())
        if not queues[hottest]:
            del queues[hottest]
    return order


ORDERS: dict[str, Callable[[Sequence[Plane]], list[Plane]]] = {"hottest first": hottest_first, "by number": by_number}


def timeline(order: Sequence[Plane], bytes_per_s: float, token_s: float) -> Timeline:
    """Loads planes one after the other and computes each when it is there; `token_s` is one token with one plane."""
    loaded = done = idle = 0.0
    for plane in order:
        loaded += plane.num_bytes / bytes_per_s
        idle += max(0.0, loaded - done)
        done = max(loaded, done) + plane.tokens * token_s
    return Timeline(done, idle, loaded, token_s * sum(plane.tokens for plane in order))


def load_orders(trace: Trace, bytes_per_s: float, flops_per_s: float) -> pd.DataFrame:
    """One row a step, layer and order of loading: `makespan_s`, `idle_s`, `load_s`, `compute_s`, as modelled.

    A token's pass over one plane is taken as one product with a matrix of the expert's size, whatever the bits.

    Args:
        trace: of a run under a method with nested bits.
        bytes_per_s: at which experts are fetched from where they lie, such as a solid-state disk or the host's memory.
        flops_per_s: at which they are computed.

    Raises:
        UserError: if the trace has no planes, or for a rate that is not above 0.
    """
    table = trace.table("planes")
    if table.empty:
        raise UserError("No bit planes were read in this trace; run a session under a method with nested bits, such as d2moe.")
    if min(bytes_per_s, flops_per_s) <= 0:
        raise UserError(f"Rates of {bytes_per_s:g} bytes and {flops_per_s:g} FLOPs a second cannot be; give some above 0.")
    phases = trace.table("steps").set_index("step")["phase"]
    rows = []
    for (step, layer), asked in table.groupby(["step", "layer"]):
        linears = trace.anatomy.layers[layer].experts.linears
        token_s = sum(2 * linear.in_features * linear.out_features for linear in linears) / flops_per_s
        columns = (asked[name].tolist() for name in ("expert", "bits", "tokens", "plane_bytes"))
        planes = [Plane(*each) for each in zip(*columns, strict=True)]
        for name, ordered in ORDERS.items():
            found = timeline(ordered(planes), bytes_per_s, token_s)
            rows.append({"step": step, "phase": phases[step], "layer": layer, "order": name, **vars(found)})
    return pd.DataFrame(rows)
