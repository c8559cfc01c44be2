"""Decode-time decisions of all layers in one go: their rows, laid end to end, look to a policy like the rows of one batch.

A decision is a dozen small operations, which at every layer of every token cost more time than they compute. A policy that
is `rowwise` gets the same rows either way, so it decides the same.
"""

from __future__ import annotations

import torch

from workbench.engine.cache import EngineLayer
from workbench.engine.call import Call, Waiting
from workbench.engine.stores.rectangular import spread, stacked


class LayerStack(EngineLayer):
    """Several layers of one policy that look like one, with the rows of all."""

    def __init__(self, layers: list[EngineLayer]):
        first = layers[0]
        self.__dict__ |= first.__dict__
        self.layers = layers
        self.store = stacked([layer.store for layer in layers])
        self._is_spread = False

    def limits(self) -> list[int]:
        """By layer and row."""
        return [limit for layer in self.layers for limit in layer.limits() or ()]

    def shares(self) -> list[int]:
        """By layer and row."""
        return [share for layer in self.layers for share in layer.shares()]

    def spread(self) -> None:
        """Gives the layers their rows, once nothing will change any more."""
        if not self._is_spread:
            spread(self.store, [layer.store for layer in self.layers])
        self._is_spread = True

    def _record(self, op: str, op_tokens: int, extra_flops: int = 0, extra_bytes: int = 0) -> None:
        count = len(self.layers)
        for layer in self.layers:
            layer._record(op, op_tokens // count, extra_flops // count, extra_bytes // count)

    def _evicted(
        self, dropped: torch.Tensor, num_dropped: int, moved: int, num_absent: int = 0, into: torch.Tensor | None = None
    ) -> None:
        self.spread()
        counts = dropped.ge(0).sum((1, 2)).view(len(self.layers), -1).sum(1).tolist()
        for layer, count in zip(self.layers, counts, strict=True):
            layer._record("evict", count, 0, moved // len(self.layers))
        self.call.record_evictions([layer.index for layer in self.layers], dropped, into)


def decide_together(call: Call) -> None:
    """Lets the layers that wait observe and decide, as many at once as are alike."""
    waiting, call.waiting = call.waiting, []
    groups: dict[tuple, list[Waiting]] = {}
    for each in waiting:
        groups.setdefault(_alike(each), []).append(each)
    for group in groups.values():
        stack = LayerStack([each.layer for each in group])
        stack.finish(torch.cat([each.query for each in group]), group[0].scaling)
        stack.spread()


def _alike(waiting: Waiting) -> tuple:
    """What layers must have in common to decide together."""
    layer = waiting.layer
    shapes = tuple((tensor.shape, tensor.dtype, tensor.device) for tensor in layer.store.buffers().values())
    return (layer.is_over(), waiting.scaling, layer.store.length, shapes)
