"""How a budget is divided over layers: pure functions of numbers, which methods share."""

from __future__ import annotations


def pyramid(mean: int, longest: int, num_layers: int, beta: int) -> list[int]:
    """Budgets that fall linearly from the first layer to the last and sum to `mean * num_layers`.

    The last layer gets about `mean / beta` and the first as much above the mean as the last is below it, but no more than
    `longest`. The step from layer to layer is a whole number; what that rounding adds is taken off again, evenly.
    PyramidKV, Cai et al. 2024, arXiv 2406.02069, and its code in KVCache-Factory.
    """
    if num_layers < 2:
        return [mean] * num_layers
    first = min(2 * mean - mean // beta, longest)
    last = 2 * mean - first
    step = (first - last) // (num_layers - 1)
    return settle([first - layer * step for layer in range(num_layers)], mean * num_layers)


def settle(budgets: list[int], total: int) -> list[int]:
    """Takes the same from every layer until the sum is `total`; what does not divide is taken from the last layers."""
    each, rest = divmod(sum(budgets) - total, len(budgets))
    return [budget - each - (layer >= len(budgets) - rest) for layer, budget in enumerate(budgets)]
