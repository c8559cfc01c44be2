"""Efficiency Leverage of a mixture of experts: the compute a dense model of equal loss would take, over its own.

The fit of Tian et al. 2025 (arXiv 2507.17702), on models that took 3e18 to 3e20 FLOPs to train and leverages below 6; beyond
that it extrapolates. The logarithms' bases are not stated there: base 10 for the compute and base 2 for the granularity are
those that give back its published values (the best granularity near 8 to 12, and more than 7 at A = 3.1%, G = 12, C = 1e22).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from workbench.cost.flops import linear_flops
from workbench.cost.routing import layer_kinds
from workbench.errors import UserError
from workbench.trace.anatomy import Anatomy

_A, _D, _GAMMA, _BETA = 1.23, -7.61e-2, 1.67e-2, -1.17e-1
_A_START, _A_MAX = 1.63e-2, 5.28e16

BEST_GRANULARITY = 2 ** (-_BETA / (2 * _GAMMA))
"""Where the fit has its peak over the granularity: 11.3."""


@dataclass(frozen=True)
class Leverage:
    """What the law says of one architecture. Predicted; nothing in it is measured."""

    activation: float
    """A: experts a token goes through over experts there are, shared ones in both."""
    granularity: float
    """G: twice the hidden size over an expert's inner size."""
    shared: float
    """S: shared experts over experts a token goes through."""
    flops_per_token: int
    """M: FLOPs of matrix products a token in one forward, embedding, head and attention scores left out."""
    train_flops: float
    """C: training compute the leverage is for."""
    leverage: float
    """EL: training compute of a dense model of equal loss, over C."""


def efficiency_leverage(activation: float, granularity: float, train_flops: float) -> float:
    """`EL = A^ ^ (alpha + gamma log2(G)^2 + beta log2(G))` with `alpha = a + d log10(C)`, and A^ the saturated A.

    Args:
        activation: A, above 0 and at most 1.
        granularity: G, above 0.
        train_flops: C, training compute of the mixture in FLOPs.

    Raises:
        UserError: for numbers outside these ranges.
    """
    if not 0 < activation <= 1:
        raise UserError(f"An activation ratio of {activation} is none; give one above 0 and at most 1.")
    for name, value in (("granularity", granularity), ("training compute", train_flops)):
        if not value > 0:
            raise UserError(f"A {name} of {value} is none; give one above 0.")
    saturated = 1 / (1 / (activation + 1 / (1 / _A_START - 1 / _A_MAX)) + 1 / _A_MAX)
    fineness = math.log2(granularity)
    exponent = _A + _D * math.log10(train_flops) + _GAMMA * fineness**2 + _BETA * fineness
    return saturated**exponent


def leverage_of(anatomy: Anatomy, train_flops: float) -> Leverage:
    """The Efficiency Leverage of a model, from its anatomy; experts are counted over its MoE layers, which may differ.

    A shared expert of another size counts as so many routed ones as it is large. Raises UserError for a dense model.
    """
    kinds = layer_kinds(anatomy).query("kind == 'moe'")
    if kinds.empty:
        raise UserError(f"{anatomy.class_name} is dense, so it has no Efficiency Leverage; give a mixture of experts.")
    shared = kinds["shared_experts"].sum()
    active = kinds["top_k"].sum() + shared
    inner = [anatomy.layers[layer].experts.linears[-1].in_features for layer in kinds["layer"]]
    granularity = 2 * anatomy.hidden_size * len(inner) / sum(inner)
    ratio = float(active / (kinds["experts"].sum() + shared))
    return Leverage(
        ratio,
        granularity,
        float(shared / active),
        flops_per_token(anatomy),
        train_flops,
        efficiency_leverage(ratio, granularity, train_flops),
    )


def flops_per_token(anatomy: Anatomy) -> int:
    """FLOPs of the layers' matrix products a token: those all tokens go through, and its own experts."""
    total = 0
    for layer in anatomy.layers:
        total += sum(linear_flops(1, linear) for linear in layer.linears)
        if layer.experts is not None:
            total += layer.experts.top_k * sum(linear_flops(1, linear) for linear in layer.experts.linears)
    return total
