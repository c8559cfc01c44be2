"""How a budget is divided between experts. Pure."""

from __future__ import annotations

import numpy as np

WIDTHS = (1, 2, 3)
"""Bits a weight that an expert may have."""

PRESENT = (2, 3)
"""Widths that at least one expert of a layer has."""


def least_bits(num_experts: int) -> int:
    """The smallest sum of bits over a layer's experts that there is a division for."""
    return sum(PRESENT) + (num_experts - len(PRESENT)) * min(WIDTHS)


def bits_by_expert(costs: np.ndarray, total: int) -> list[int]:
    """Bits for each expert, of least cost in all, their sum no more than `total`: MC-MoE's integer program.

    One binary variable an expert and width; an expert has one width, and each of `PRESENT` is given at least once.

    Args:
        costs: `[E, W]` cost of an expert at each of `WIDTHS`, 0 or more.
        total: bits over all experts, `least_bits` or more.

    Source: Huang et al., arXiv 2410.06270.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp  # takes a quarter of a second, which no other method needs

    num_experts, num_widths = costs.shape
    one_each = np.kron(np.eye(num_experts), np.ones(num_widths))
    spent = np.tile(WIDTHS, num_experts)
    present = np.tile(np.eye(num_widths)[[WIDTHS.index(width) for width in PRESENT]], num_experts)
    solved = milp(
        (costs / max(costs.max(), np.finfo(float).tiny)).ravel(),
        integrality=np.ones(costs.size),
        bounds=Bounds(0, 1),
        constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(spent, 0, total), LinearConstraint(present, 1, np.inf)],
        options={"mip_rel_gap": 0.0},
    )
    if not solved.success:
        raise ValueError(f"No division of {total} bits over {num_experts} experts: {solved.message}")
    return [WIDTHS[place] for place in solved.x.reshape(costs.shape).argmax(1)]
