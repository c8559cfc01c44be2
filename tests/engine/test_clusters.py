"""Complete-link clusters of experts: what they promise, and a case by hand."""

from __future__ import annotations

import itertools

import pytest
import torch

from workbench.engine.clusters import clustered, clustered_to


def drawn(num_layers: int, count: int, seed: int = 0) -> torch.Tensor:
    distances = torch.randn(num_layers, count, count, generator=torch.Generator().manual_seed(seed))
    return distances + distances.mT


def test_a_pair_too_far_apart_keeps_clusters_from_merging():
    # nearest: 0-1 (-5), then 2-3 (-4), then 1-2 (-3), whose clusters are forbidden by 0-3 (2); 4 joins 2-3 at -1, not at -2
    distances = torch.full((1, 5, 5), 9.0)
    near = {(0, 1): -5.0, (2, 3): -4.0, (1, 2): -3.0, (0, 2): -3.0, (1, 3): -3.0, (0, 3): 2.0, (2, 4): -2.0, (3, 4): -1.0}
    for (one, other), distance in near.items():
        distances[0, one, other] = distances[0, other, one] = distance
    assert clustered(distances, -torch.inf) == clustered(distances, -5.0) == [[[0], [1], [2], [3], [4]]]
    assert clustered(distances, -4.0) == [[[0, 1], [2], [3], [4]]]
    assert clustered(distances, -1.0) == [[[0, 1], [2, 3], [4]]]
    assert clustered(distances, 0.0) == [[[0, 1], [2, 3, 4]]]
    assert clustered(distances, 2.5) == [[[0, 1, 2, 3], [4]]]
    assert clustered(distances, 0.0, least=3) == [[[0, 1], [2, 3], [4]]]


@pytest.mark.parametrize("count", [3, 4, 11, 17, 23, 24])
def test_clusters_are_a_partition_of_every_layer_within_the_threshold_and_as_many_as_asked_for(count):
    for seed in range(5):
        distances = drawn(3, 8, seed)
        found, threshold = clustered_to(distances, count)
        assert sum(map(len, found)) == count
        for layer, clusters in enumerate(found):
            assert sorted(itertools.chain(*clusters)) == list(range(8))
            for members in clusters:
                assert all(distances[layer, one, other] < threshold for one, other in itertools.combinations(members, 2))


def test_experts_equally_far_apart_are_merged_to_the_count_all_the_same():
    found, threshold = clustered_to(torch.zeros(2, 4, 4), 5)
    assert found == [[[0, 1, 2, 3]], [[0], [1], [2], [3]]] and threshold == torch.inf
