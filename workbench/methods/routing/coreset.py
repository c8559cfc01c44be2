"""Routing inside a coreset: the experts that all tokens of one call and layer share. Dynamic Expert Sharing, arXiv 2602.00879.

Shapes: T tokens of a call, E experts, K those the model gives a token.
"""

from __future__ import annotations

import dataclasses

import torch

from workbench.engine.experts import Routed, RouteState

_LOGIT_BYTES = 4


def favourites(state: RouteState, count: int) -> torch.Tensor:
    """`[T, E]` bool: every token's best `count` experts of those the model gave it; none of a token that is padding."""
    best = state.weights.topk(count, dim=-1).indices
    marks = torch.zeros_like(state.logits, dtype=torch.bool).scatter_(-1, state.experts.gather(-1, best), True)
    return marks & state.there[:, None]


def route_inside(state: RouteState, core: torch.Tensor) -> Routed:
    """Every token's best K experts of a core `[E]` bool, all of it if it has fewer, weighed as the model's gate does.

    Where a gate chooses groups first, experts of a token's other groups follow those of its chosen ones, so that no token
    whose groups have nothing in the core is left without experts.
    """
    chosen = state.gate.ranking(state.logits)
    anywhere = dataclasses.replace(state.gate, groups=(1, 1)).ranking(state.logits)
    below = anywhere - (anywhere.amax() - anywhere.amin() + 1)
    ranking = torch.where(chosen == -torch.inf, below, chosen).masked_fill(~core, -torch.inf)
    best = ranking.topk(state.experts.shape[-1], dim=-1)
    experts = best.indices.masked_fill(best.values == -torch.inf, state.num_experts)
    return Routed(experts, state.gate.weights(state.logits, experts).to(state.weights.dtype))


def decision_bytes(state: RouteState) -> int:
    """Two passes over the router's logits, as in the paper's two kernels: one makes the core, one routes inside it."""
    return 2 * _LOGIT_BYTES * state.logits.numel()
