"""How a budget is divided over layers, or over the kv heads of a layer: pure functions of numbers, which methods share."""

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


def adaptive(hits: list[int], floor: float) -> list[int]:
    """Budgets of a layer's kv heads, between `hits` and the same for all: `hits (1 - floor) + mean(hits) floor`.

    `hits[h]` is how many of the layer's best tokens are head h's. Rounding keeps the sum: the largest remainders go up, of
    equal ones the earlier head's.
    AdaKV, Feng et al. 2024, arXiv 2407.11550.
    """
    exact = [hit * (1 - floor) + sum(hits) / len(hits) * floor for hit in hits]
    return whole(exact, sum(hits))


def whole(shares: list[float], total: int) -> list[int]:
    """Shares that sum to `total`, as whole numbers that do so too: the largest remainders are rounded up."""
    budgets = [int(share + 1e-9) for share in shares]
    order = sorted(range(len(shares)), key=lambda index: budgets[index] - shares[index])
    for index in order[: total - sum(budgets)]:
        budgets[index] += 1
    return budgets


def streaming(total: int, num_heads: int, longest: int, streamed: int) -> tuple[int, list[int]]:
    """How many of a layer's kv heads may keep all of `longest` tokens, and what each of the others keeps.

    The others keep at least `streamed`, sinks and recent tokens, or an equal share of `total` where that is less. What
    the whole heads leave lengthens them, so that the sum is `total`.
    DuoAttention, Xiao et al. 2024, arXiv 2410.10819, fixes the share of whole heads instead.
    """
    spare = total - num_heads * streamed
    num_whole = min(max(0, spare // (longest - streamed)), num_heads) if longest > streamed else 0
    others = num_heads - num_whole
    rest = min(total - num_whole * longest, others * longest)
    return num_whole, whole([rest / others] * others, rest) if others else []
