"""Clusters of experts whose members are all near each other (complete link), found greedily over all layers. Pure.

Shapes: L layers, E experts.
"""

from __future__ import annotations

import torch

Clusters = list[list[int]]
"""Of one layer: the members of each, ascending, and clusters by their first member."""


def clustered(distances: torch.Tensor, threshold: float, least: int = 1) -> list[Clusters]:
    """Clusters of each layer for distances `[L, E, E]`, symmetric, by merging the nearest experts of all layers first.

    Two clusters merge if every distance across them is below the threshold, and as long as more than `least` are left in all.
    """
    num_layers, count = distances.shape[:2]
    members = [[[expert] for expert in range(count)] for _ in range(num_layers)]
    home = [list(range(count)) for _ in range(num_layers)]
    left = num_layers * count
    known = distances.tolist()
    for layer, one, other in _by_distance(distances, threshold):
        first, second = sorted((home[layer][one], home[layer][other]))
        if left <= least:
            break
        if first == second:
            continue
        across = (known[layer][a][b] for a in members[layer][first] for b in members[layer][second])
        if all(distance < threshold for distance in across):
            members[layer][first] += members[layer][second]
            for expert in members[layer][second]:
                home[layer][expert] = first
            members[layer][second] = []
            left -= 1
    return [[sorted(each) for each in of_layer if each] for of_layer in members]


def clustered_to(distances: torch.Tensor, count: int) -> tuple[list[Clusters], float]:
    """Exactly `count` clusters over all layers, at least one a layer, and the threshold that halving ends with."""
    num_layers, num_experts = distances.shape[:2]
    if count >= num_layers * num_experts:
        return clustered(distances, -torch.inf), -torch.inf
    pairs = torch.triu_indices(num_experts, num_experts, 1)
    steps = distances[:, pairs[0], pairs[1]].unique().tolist()
    thresholds = [*steps[1:], torch.inf]  # below which lie the distances up to each step
    low, high = 0, len(thresholds) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(map(len, clustered(distances, thresholds[middle], count))) > count:
            low = middle + 1
        else:
            high = middle
    return clustered(distances, thresholds[low], count), thresholds[low]


def _by_distance(distances: torch.Tensor, threshold: float) -> list[tuple[int, int, int]]:
    """Layer and two experts of every pair nearer than a threshold, nearest first; of equal ones the first."""
    count = distances.shape[1]
    pairs = torch.triu_indices(count, count, 1)
    near = distances[:, pairs[0], pairs[1]].flatten()
    order = near.argsort(stable=True)
    order = order[near[order] < threshold]
    layers, numbers = order // pairs.shape[1], order % pairs.shape[1]
    return list(zip(layers.tolist(), pairs[0][numbers].tolist(), pairs[1][numbers].tolist(), strict=True))
