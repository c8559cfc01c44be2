"""How tokens are divided over layers, or over the kv heads of a layer: pure functions of numbers, which methods share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

_HALVINGS = 60
"""Enough to tell any two doubles in [0, 1] apart; the paper's code has no such limit and may never end."""


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


def adaptive_each(hits: list[int], floor: float) -> list[int]:
    """The same as the paper's code rounds it, each head by itself: `round(hits (1 - floor) + int(mean(hits) floor))`.

    The sum may fall short of that of `hits`, by less than 3/2 a head. Where it would exceed it, those that were rounded up
    the farthest are rounded down, of equal ones the later head's.
    """
    least = int(sum(hits) / len(hits) * floor)
    exact = [hit * (1 - floor) + least for hit in hits]
    budgets = [round(share) for share in exact]
    order = sorted(range(len(hits)), key=lambda head: (exact[head] - budgets[head], -head))
    for head in order[: max(sum(budgets) - sum(hits), 0)]:
        budgets[head] -= 1
    return budgets


def whole(shares: list[float], total: int) -> list[int]:
    """Shares that sum to `total`, as whole numbers that do so too: the largest remainders are rounded up."""
    budgets = [int(share + 1e-9) for share in shares]
    order = sorted(range(len(shares)), key=lambda index: budgets[index] - shares[index])
    for index in order[: total - sum(budgets)]:
        budgets[index] += 1
    return budgets


def in_proportion(wants: Sequence[float], rooms: Sequence[int], total: int) -> list[int]:
    """Shares of `total` in proportion to `wants`, all above 0, in whole numbers, none above its room.

    What one has no room for goes to the others, in proportion again; the sum is `total`, or that of the rooms if less.
    """
    shares = list(map(float, rooms))
    open_ = list(range(len(wants)))
    while open_:
        rest = total - sum(rooms[index] for index in range(len(rooms)) if index not in open_)
        wanted = sum(wants[index] for index in open_)
        roomy = [index for index in open_ if rest * wants[index] < rooms[index] * wanted]
        if len(roomy) == len(open_):
            for index in open_:
                shares[index] = rest * wants[index] / wanted
            break
        open_ = roomy
    return whole(shares, min(total, sum(rooms)))


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


def prefix_drops(importance: Sequence[np.ndarray], protected: int, target: int) -> list[int]:
    """Tokens each layer drops, so that all layers keep the same share of their importance; about `target` in sum.

    A layer keeps the shortest prefix of its tokens, sorted by importance, that holds a share p of the whole, and
    `protected` tokens more. p is found by bisection. The number of drops falls in jumps as p rises, so the nearer side of
    the jump is taken, scaled to `target` and truncated: never more than `target` if the nearer side drops enough.
    PrefixKV, Wang et al. 2024, arXiv 2412.03409, and its code.

    Args:
        importance: of each layer's tokens, highest first.
        protected: tokens every layer keeps beyond the prefix.
        target: tokens to drop in all layers together.
    """
    sums = [np.cumsum(each, dtype=np.float64) for each in importance]
    shares = [np.round(each / each[-1], 12) for each in sums]  # so that rounding alone opens no jump

    def drops(share: float) -> list[int]:
        return [max(len(each) - int(np.searchsorted(each, share)) - 1 - protected, 0) for each in shares]

    low, high = 0.0, 1.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        if sum(drops(middle)) > target:
            low = middle
        else:
            high = middle
    nearer = min(drops(low), drops(high), key=lambda each: abs(sum(each) - target))
    total = max(sum(nearer), 1)
    return [each * target // total for each in nearer]


def by_preference(preferences: Sequence[float], total: int, longest: Sequence[int]) -> list[int]:
    """Shares of `total` in proportion to the layers' preferences, in whole numbers that sum to it.

    What a share exceeds the layer's longest by is spread evenly over the layers that have room, once: a layer that then
    exceeds its own stays there, and what it cannot use is lost. CAKE, Qin et al. 2025, arXiv 2503.12491, and its code.
    """
    whole = sum(preferences)
    wanted = [int(total * each / whole) if whole else total // len(preferences) for each in preferences]
    shares = list(map(min, wanted, longest))
    roomy = [layer for layer, most in enumerate(longest) if shares[layer] < most]
    _spread(shares, roomy, sum(wanted) - sum(shares))
    _spread(shares, range(len(shares)), total - sum(shares))
    return shares


def _spread(shares: list[int], layers: Sequence[int], amount: int) -> None:
    """Adds the same to each of some layers; what does not divide goes to the first."""
    each, rest = divmod(amount, len(layers)) if layers else (0, 0)
    for number, layer in enumerate(layers):
        shares[layer] += each + (number < rest)


def by_error(errors: Sequence[float], mean: int, least: int, most: int) -> list[int]:
    """Budgets that sum to `mean` a layer: `least` for each, and of what is left each layer's share of the error.

    No budget exceeds `most`. What rounding and that bound leave over goes one by one to the layers of highest error, round
    after round; what they exceed the sum by is taken from the layers of lowest error in the same way.
    CompressKV, Lin et al. 2025, arXiv 2508.02401, and its code.

    Args:
        errors: what dropping costs in each layer; they sum to one.
        mean: tokens a layer, on average.
        least: tokens of each layer at least, at most `mean`.
        most: tokens of each layer at most, at least `mean`.
    """
    spare = (mean - least) * len(errors)
    budgets = [min(max(least + round(error * spare), least), most) for error in errors]
    order = sorted(range(len(errors)), key=lambda layer: -errors[layer])
    while missing := mean * len(errors) - sum(budgets):
        step = 1 if missing > 0 else -1
        open_ = [layer for layer in order[::step] if least <= budgets[layer] + step <= most]
        for layer in open_[: abs(missing)]:
            budgets[layer] += step
    return budgets


def by_gates(gates: Sequence[Sequence[float]], mean: int, longest: int, streamed: int) -> list[int]:
    """Budgets of layers, tokens a kv head, when the heads of highest gate in the whole model keep all of `longest` tokens.

    The others keep at least `streamed`, or `mean` where that is less. As many heads are whole as `mean` a head allows; what
    they leave over is spread over the layers, so that budgets sum to `mean` a layer.
    DuoAttention, Xiao et al. 2024, arXiv 2410.10819, fixes the share of whole heads instead.
    """
    num_layers, num_heads = len(gates), len(gates[0])
    if longest <= streamed or mean <= streamed:
        return [mean] * num_layers
    ranked = sorted(
        ((layer, head) for layer in range(num_layers) for head in range(num_heads)),
        key=lambda place: -gates[place[0]][place[1]],
    )
    num_whole = min((mean - streamed) * len(ranked) // (longest - streamed), len(ranked))
    while True:
        layers = [layer for layer, _ in ranked[:num_whole]]
        budgets = [streamed + -(-layers.count(layer) * (longest - streamed) // num_heads) for layer in range(num_layers)]
        spare = mean * num_layers - sum(budgets)
        if spare >= 0:
            break
        num_whole -= 1  # budgets are whole tokens a head, and rounding them up may take one head too many
    while spare:
        roomy = [layer for layer, budget in enumerate(budgets) if budget < longest][:spare]
        for layer in roomy:
            budgets[layer] += 1
        spare -= len(roomy)
    return budgets


def two_groups(high: Sequence[bool], mean: int, longest: int, ratio: float) -> list[int]:
    """Budgets of kv heads that sum to `mean` a head: those of the high group get `ratio` times as much as the others.

    None gets more than `longest` or, if the sum allows, less than one token; the other group makes up for it.
    UNComp, Xiong et al. 2024, arXiv 2410.03090, and its code: 2 to 1.
    """
    total, num_high = mean * len(high), sum(high)
    num_low = len(high) - num_high
    low = max(total / (num_high * ratio + num_low), 1.0)
    if num_low:
        low = max(low, (total - num_high * longest) / num_low)
    most = (total - num_low * low) / num_high if num_high else 0.0
    return whole([most if is_high else low for is_high in high], total)


def stages(entropies: Sequence[float], fall: float) -> list[int]:
    """The stage of each layer, from 0: a new one begins where the entropy is more than `fall` below the layer before.

    UNComp, Xiong et al. 2024, arXiv 2410.03090, and its code.
    """
    begins = (before - here > fall for before, here in itertools.pairwise(entropies))
    return [0, *itertools.accumulate(map(int, begins))]


def stage_size(stage: int, last: int, least: int, prompt_tokens: int) -> int:
    """Tokens that reach a stage: all of them the first, `least` the last, and between them in even steps, rounded down.

    `last` is the number of the last stage. UNComp, Xiong et al. 2024, arXiv 2410.03090, and its code.
    """
    return least + (prompt_tokens - least) // last * (last - stage) if stage else prompt_tokens
