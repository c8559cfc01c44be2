"""Kept sets equal those of plain loops, written for this test from the papers' formulas; nothing is shared with the project.

Every reference takes one row: `q[head][query]`, `k[head][slot]` and `v[head][slot]` as lists of floats, and returns the set
of positions each kv head keeps. Random floats have no ties.
"""

from __future__ import annotations

import math
import zlib

import pytest
import torch

import workbench as wb
from workbench.engine.policy import LayerState
from workbench.probes.rotation import Rotation

HEADS = {"MHA": (3, 3), "GQA": (6, 2), "MQA": (4, 1)}
LENGTHS = (3, 13, 37)
"""Of two keys both are equally like their mean, a tie for KeyDiff, so three is the least."""
BUDGETS = (1, 4, 9, 0.3, 0.75)
FREQUENCIES, FUTURE = (1.0, 0.3, 0.05), 7


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def softmax(logits):
    weights = [math.exp(logit - max(logits)) for logit in logits]
    return [weight / sum(weights) for weight in weights]


def best(scores, count):
    """Indices of the `count` highest of a dict of scores."""
    return set(sorted(scores, key=lambda index: -scores[index])[:count])


def attention_row(q, k, num_q_heads, head, query, length):
    """What query number `query` of a head gives to each of `length` keys."""
    keys = k[head * len(k) // num_q_heads]
    return softmax([dot(q[head][query], keys[j]) / math.sqrt(len(keys[j])) if j <= query else -math.inf for j in range(length)])


def window_of(capacity, length, window):
    return max(1, min(window, capacity // 2, length))


def snapkv_sets(q, k, capacity, window, kernel, pooling):
    num_q_heads, num_kv_heads, length = len(q), len(k), len(k[0])
    group = num_q_heads // num_kv_heads
    kept = []
    for kv_head in range(num_kv_heads):
        total = [0.0] * length
        for head in range(kv_head * group, (kv_head + 1) * group):
            votes = [0.0] * length
            for query in range(length - window, length):
                for j, weight in enumerate(attention_row(q, k, num_q_heads, head, query, length)):
                    votes[j] += weight
            for j in range(length - window):
                around = [votes[i] if 0 <= i < length - window else 0.0 for i in range(j - kernel // 2, j + kernel // 2 + 1)]
                total[j] += (sum(around) / kernel if pooling == "avg" else max(around)) / group
        before = {j: total[j] for j in range(length - window)}
        kept.append(best(before, capacity - window) | set(range(length - window, length)))
    return kept


def snapkv(q, k, v, capacity, layer, num_layers):
    window = window_of(capacity, len(k[0]), 5)
    return snapkv_sets(q, k, capacity, window, 3, "avg")


def pyramidkv(q, k, v, capacity, layer, num_layers):
    """The layer's budget as in the paper's code, less an equal share of what its whole-number step adds to the sum."""
    length = len(k[0])
    window = window_of(capacity, length, 5)
    mean = capacity - window
    if length <= capacity or length < 2 * mean:
        return snapkv_sets(q, k, capacity, window, 3, "avg")
    smallest = mean // 20
    largest = 2 * mean - smallest
    if largest >= length - window:
        largest, smallest = length - window, 2 * mean - (length - window)
    step = (largest - smallest) // (num_layers - 1)
    budgets = [largest - number * step for number in range(num_layers)]
    number = num_layers
    while sum(budgets) > mean * num_layers:
        number = number - 1 if number else num_layers - 1
        budgets[number] -= 1
    return snapkv_sets(q, k, budgets[layer] + window, window, 3, "avg")


def adakv(q, k, v, capacity, layer, num_layers):
    """The layer's best tokens are counted by head; a fifth of the budget is divided evenly, remainders by size."""
    num_q_heads, num_kv_heads, length = len(q), len(k), len(k[0])
    group, window = num_q_heads // num_kv_heads, window_of(capacity, length, 5)
    totals = {}
    for head in range(num_q_heads):
        rows = [attention_row(q, k, num_q_heads, head, query, length) for query in range(length - window, length)]
        votes = [sum(row[j] for row in rows) for j in range(length)]
        for j in range(length - window):
            around = [votes[i] if 0 <= i < length - window else 0.0 for i in (j - 1, j, j + 1)]
            totals[head // group, j] = totals.get((head // group, j), 0.0) + sum(around) / 3 / group
    before = {key: total for key, total in totals.items() if key[1] < length - window}
    mean = capacity - window
    chosen = best(before, mean * num_kv_heads)
    exact = [sum(head == kv_head for head, _ in chosen) * 0.8 + mean * 0.2 for kv_head in range(num_kv_heads)]
    counts = [math.floor(share + 1e-9) for share in exact]
    while sum(counts) < mean * num_kv_heads:
        counts[max(range(num_kv_heads), key=lambda head: exact[head] - counts[head])] += 1
    own = [{j: total for (head, j), total in before.items() if head == kv_head} for kv_head in range(num_kv_heads)]
    return [best(scores, count) | set(range(length - window, length)) for scores, count in zip(own, counts, strict=True)]


def tova(q, k, v, capacity, layer, num_layers):
    length = len(k[0])
    rows = [attention_row(q, k, len(q), head, length - 1, length) for head in range(len(q))]
    mean = {j: sum(row[j] for row in rows) / len(rows) for j in range(length)}
    return [best(mean, capacity) for _ in k]


def knorm(q, k, v, capacity, layer, num_layers):
    return [best({j: -math.sqrt(dot(key, key)) for j, key in enumerate(keys)}, capacity) for keys in k]


def keydiff(q, k, v, capacity, layer, num_layers):
    kept = []
    for keys in k:
        units = [[x / math.sqrt(dot(key, key)) for x in key] for key in keys]
        anchor = [sum(unit[d] for unit in units) / len(units) for d in range(len(keys[0]))]
        length = math.sqrt(dot(anchor, anchor))
        kept.append(best({j: -dot(unit, anchor) / length for j, unit in enumerate(units)}, capacity))
    return kept


def streaming_llm(q, k, v, capacity, layer, num_layers):
    length = len(k[0])
    sinks = min(4, capacity - 1)
    return [set(range(sinks)) | set(range(length - (capacity - sinks), length)) for _ in k]


def turned(vector, angles):
    """Elements i and i + 3 of six turned by `angles[i]`."""
    x, y = vector[:3], vector[3:]
    cos, sin = [math.cos(a) for a in angles], [math.sin(a) for a in angles]
    return [a * c - b * s for a, b, c, s in zip(x, y, cos, sin, strict=True)] + [
        b * c + a * s for a, b, c, s in zip(x, y, cos, sin, strict=True)
    ]


def expected_attention(q, k, v, capacity, layer, num_layers):
    num_q_heads, num_kv_heads, length, dim = len(q), len(k), len(k[0]), 6
    skipped = min(2, length - 1)
    axes = [[float(i == j) for j in range(dim)] for i in range(dim)]
    kept = []
    for kv_head in range(num_kv_heads):
        group = range(kv_head * num_q_heads // num_kv_heads, (kv_head + 1) * num_q_heads // num_kv_heads)
        scores = dict.fromkeys(range(2, length), 0.0)
        for head in group:
            before = [turned(q[head][t], [-t * f for f in FREQUENCIES]) for t in range(skipped, length)]
            mean = [sum(x[i] for x in before) / len(before) for i in range(dim)]
            covariance = [
                [sum((x[i] - mean[i]) * (x[j] - mean[j]) for x in before) / len(before) for j in range(dim)] for i in range(dim)
            ]
            columns = [[0.0] * dim for _ in range(dim)]  # of the averaged rotation R
            for step in range(FUTURE):
                for i in range(dim):
                    for j, x in enumerate(turned(axes[i], [(length + step) * f for f in FREQUENCIES])):
                        columns[i][j] += x / FUTURE
            future = [sum(columns[i][j] * mean[i] for i in range(dim)) for j in range(dim)]
            logits = []
            for j in range(2, length):
                key = k[kv_head][j]
                back = [dot(columns[i], key) for i in range(dim)]  # R^T k
                spread = sum(back[a] * covariance[a][b] * back[b] for a in range(dim) for b in range(dim))
                logits.append(dot(key, future) / math.sqrt(dim) + spread / dim / 2)
            if logits:
                for j, weight in zip(range(2, length), softmax(logits), strict=True):
                    scores[j] += weight / len(group) * math.sqrt(dot(v[kv_head][j], v[kv_head][j]))
        sinks = set(range(min(2, capacity)))
        kept.append(sinks | best(scores, capacity - len(sinks)))
    return kept


CASES = {
    "snapkv": (dict(window=5, kernel=3), snapkv),
    "pyramidkv": (dict(window=5, kernel=3, pooling="avg"), pyramidkv),
    "adakv": (dict(window=5, kernel=3, pooling="avg"), adakv),
    "tova": ({}, tova),
    "knorm": ({}, knorm),
    "keydiff": ({}, keydiff),
    "streaming-llm": ({}, streaming_llm),
    "expected-attention": (dict(sinks=2, future=FUTURE), expected_attention),
}


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("name", CASES)
def test_kept_sets_equal_plain_loops(name, heads, length):
    """A batch of two rows, the shorter one padded on the left, in the first, middle and last of five layers."""
    knobs, plain = CASES[name]
    num_q_heads, num_kv_heads = HEADS[heads]
    generator = torch.Generator().manual_seed(zlib.crc32(f"{name} {heads} {length}".encode()))
    lengths, dim = (length, max(3, length - 3)), 6
    queries = torch.randn(2, num_q_heads, length, dim, generator=generator) * 2
    keys, values = torch.randn(2, 2, num_kv_heads, length, dim, generator=generator).unbind(0)
    positions = torch.arange(length) - torch.tensor([length - each for each in lengths])[:, None]
    positions = positions.clamp(min=-1)[:, None].expand(2, num_kv_heads, length)
    rotation = Rotation(torch.tensor(FREQUENCIES))
    for budget in BUDGETS:
        method = wb.METHODS[name](budget=budget, **knobs)
        shares = [method.allocate(each, 5) for each in lengths]
        for layer in (0, 2, 4):
            capacity = torch.tensor([share[layer] for share in shares])
            state = LayerState(keys, values, positions, capacity, dim**-0.5, layer, 5, "prefill", queries, None, rotation)
            mask = method.keep(state)
            for row, each in enumerate(lengths):
                promised = budget if isinstance(budget, int) else max(1, round(budget * each))
                if promised >= each:
                    continue
                q, k, v = (tensor[row, :, length - each :].tolist() for tensor in (queries, keys, values))
                kept = [set(positions[row, head][mask[row, head]].tolist()) for head in range(num_kv_heads)]
                assert kept == plain(q, k, v, promised, layer, 5), (budget, layer, row)
