"""What verifying several tokens at once costs a mixture of experts: MoESD (arXiv 2505.19645), as pure functions.

In speculative decoding the model reads the `gamma` drafted tokens of each row and the one before them in one step, `gamma + 1`
tokens in flight a row. A dense model bound by memory reads the same weights for them as for one; a mixture reads the experts
they choose, until all are touched. Target efficiency is what a step of one token a row takes, over what the verifying step
takes: 1 where verifying is free. Everything here is predicted but for `seen_beside_expected`, which says what it counted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from workbench.cost.hardware import ELEMENT_BYTES, Hardware
from workbench.cost.hardware import hardware as sheet
from workbench.cost.plan import table_of
from workbench.cost.roofline import dtype_of, layer_seconds
from workbench.cost.routing import expected_unique, expert_bytes, unique_experts
from workbench.errors import UserError
from workbench.trace.anatomy import Anatomy
from workbench.trace.pairs import causal_pairs
from workbench.trace.schema import TABLES
from workbench.trace.trace import Trace


def mean_load(tokens: Any, num_experts: Any, top_k: Any) -> Any:
    """Tokens a touched expert is given on average, of t that choose independently: `rho t / (1 - (1 - rho)^t)`, rho = K/E."""
    return top_k * tokens / expected_unique(tokens, num_experts, top_k)


def saturation_tokens(num_experts: int, top_k: int) -> float:
    """Tokens in flight from which on 95% of the experts are expected to be touched: `ln(0.05) / ln(1 - K/E)`, 1 or more.

    Raises UserError where K is not between 1 and E.
    """
    if not 1 <= top_k <= num_experts:
        raise UserError(f"A token cannot be given {top_k} of {num_experts} experts; give 1 to {num_experts}.")
    return 1.0 if top_k == num_experts else max(1.0, math.log(0.05) / math.log1p(-top_k / num_experts))


@dataclass(frozen=True)
class SpeedUp:
    """Of speculative decoding over one token a step, in its parts: the algorithm's, the system's, and what drafting costs."""

    gamma: int
    sigma: float
    """Tokens made a round, of the gamma + 1 possible."""
    target_efficiency: float
    """What a step of one token takes, over what the verifying step takes."""
    draft_cost: float
    """Of a round's drafts, in steps of one token of the target."""
    reject_cost: float
    """Of rejecting, in the same unit."""

    @property
    def total(self) -> float:
        """`sigma (gamma + 1) / (draft + 1 / target efficiency + reject)`."""
        return self.sigma * (self.gamma + 1) / (self.draft_cost + 1 / self.target_efficiency + self.reject_cost)


def speed_up(
    gamma: int, tokens_per_round: float, target_s: float, verify_s: float, draft_s: float = 0.0, reject_s: float = 0.0
) -> SpeedUp:
    """The parts of a speed-up, from seconds that were all measured, or all predicted.

    Args:
        gamma: tokens drafted a round.
        tokens_per_round: tokens a round makes on average, 1 to gamma + 1.
        target_s: a step of one token a row.
        verify_s: a step of gamma + 1 tokens a row.
        draft_s: one token of the draft model.
        reject_s: choosing what is kept of a round.

    Raises:
        UserError: for fewer than one drafted token, and for more tokens a round than there can be.
    """
    _check(gamma)
    if not 0 < tokens_per_round <= gamma + 1:
        raise UserError(f"A round of {gamma} drafted tokens cannot make {tokens_per_round} tokens; 1 to {gamma + 1} can be.")
    sigma = tokens_per_round / (gamma + 1)
    return SpeedUp(gamma, sigma, target_s / verify_s, gamma * draft_s / target_s, reject_s / target_s)


def step_bytes(anatomy: Anatomy, tokens: int, batch: int = 1, context: int = 0) -> float:
    """Bytes a step of so many tokens a row must read: weights, those of the experts expected to be touched, and K and V."""
    every_token = [linear for layer in anatomy.layers for linear in layer.linears]
    weights = sum(linear.in_features * linear.out_features for linear in (*every_token, anatomy.lm_head))
    held = sum(each.attention.cached_elements * min(context, each.attention.window or context) for each in anatomy.layers)
    experts = sum(
        expert_bytes(anatomy, each.index) * expected_unique(batch * tokens, each.experts.num_experts, each.experts.top_k)
        for each in anatomy.layers
        if each.experts is not None
    )
    return anatomy.element_bytes * (weights + batch * held) + experts


def step_seconds(
    anatomy: Anatomy, tokens: int, hardware: str | Path | Hardware, batch: int = 1, context: int = 0, dtype: str | None = None
) -> float:
    """Predicted seconds of a step of so many tokens a row after `context` of them: in each part the slower of FLOPs and bytes.

    Raises UserError for a sheet or dtype that does not exist.
    """
    device = sheet(hardware)
    chosen = dtype_of(anatomy, device, dtype)
    anatomy = replace(anatomy, dtype=chosen, element_bytes=ELEMENT_BYTES[chosen])
    trace = _planned_step(anatomy, tokens, batch, context)
    return float(layer_seconds(trace, device, chosen, _expected(anatomy, batch * tokens))["predicted_s"].sum())


def target_efficiency(
    anatomy: Anatomy,
    gamma: int,
    *,
    batch: int = 1,
    context: int = 0,
    hardware: str | Path | Hardware | None = None,
    dtype: str | None = None,
) -> float:
    """Predicted target efficiency of verifying `gamma` drafted tokens a row, if tokens choose their experts independently.

    Without hardware it is the ratio of bytes (`step_bytes`), true as long as memory binds; with a sheet the ratio of seconds
    (`step_seconds`). Raises UserError for fewer than one drafted token.
    """
    _check(gamma)
    if hardware is None:
        return step_bytes(anatomy, 1, batch, context) / step_bytes(anatomy, gamma + 1, batch, context)
    one, several = (step_seconds(anatomy, tokens, hardware, batch, context, dtype) for tokens in (1, gamma + 1))
    return one / several


def seen_beside_expected(trace: Trace, phase: str | None = None) -> pd.DataFrame:
    """One row a layer and number of tokens in flight: the experts hit, and those expected of independent uniform choices.

    `measured_unique` and `measured_load` (tokens an expert that was hit got) are means over the steps of that size, `ratio` is
    measured over predicted experts: below 1 where tokens in flight choose alike. Raises UserError if no expert was called.
    """
    table = unique_experts(trace)
    table = table if phase is None else table[table["phase"] == phase]
    sizes = {each.index: each.experts for each in trace.anatomy.layers if each.experts is not None}
    rows = []
    for (layer, tokens), steps in table.groupby(["layer", "tokens"]):
        num_experts, top_k = sizes[layer].num_experts, sizes[layer].top_k
        predicted = expected_unique(tokens, num_experts, top_k)
        rows.append(
            {
                "layer": layer,
                "tokens": tokens,
                "steps": len(steps),
                "measured_unique": steps["unique"].mean(),
                "predicted_unique": predicted,
                "ratio": steps["unique"].mean() / predicted,
                "measured_load": (steps["given"] / steps["unique"].clip(lower=1)).mean(),
                "predicted_load": mean_load(tokens, num_experts, top_k),
            }
        )
    return pd.DataFrame(rows)


def _check(gamma: int) -> None:
    if gamma < 1:
        raise UserError(f"Verifying {gamma} drafted tokens is no speculation; give 1 or more.")


def _expected(anatomy: Anatomy, tokens: int) -> pd.DataFrame:
    """Tokens sent to experts and experts hit in one step, `step, layer, tokens, hit`."""
    rows = []
    for layer in anatomy.layers:
        if layer.experts is not None:
            hit = expected_unique(tokens, layer.experts.num_experts, layer.experts.top_k)
            rows.append({"step": 0, "layer": layer.index, "tokens": tokens * layer.experts.top_k, "hit": hit})
    return pd.DataFrame(rows, columns=["step", "layer", "tokens", "hit"])


def _planned_step(anatomy: Anatomy, tokens: int, batch: int, context: int) -> Trace:
    """The trace one step of a dense cache would leave, with the logits of every token, which verifying needs."""
    seen = context + tokens
    step = {"step": [0], "phase": ["append" if context else "prefill"], "batch": [batch], "tokens": [batch * tokens]}
    step |= {"context": [seen], "logits": [batch * tokens], "setup": ["dense"]}
    windows = [layer.attention.window for layer in anatomy.layers]
    read = np.array([seen if window is None else min(seen, window + tokens - 1) for window in windows])
    count = len(windows)
    attention = {
        "step": [0] * count,
        "layer": list(range(count)),
        "batch": [batch] * count,
        "q_len": [tokens] * count,
        "kv_read": read,
        "kv_held": read,
        "pairs": [batch * causal_pairs(tokens, seen, window) for window in windows],
        "kernel": ["sdpa"] * count,
        "mask": ["causal"] * count,
    }
    tables = {name: schema.empty_table() for name, schema in TABLES.items()}
    tables |= {"steps": table_of("steps", step), "attention": table_of("attention", attention)}
    return Trace({"anatomy": anatomy.to_dict(), "setup": "dense", "planned": True, "complete": True}, tables)
