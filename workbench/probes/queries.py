"""Keeps the queries a model's attention sees, and how much attention the prompt gave to each of its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from workbench.trace.recording import LayerTensors
from workbench_kernels.column_mass import column_mass


class QueryProbe:
    """Keeps the queries of every attention call of some layers of a run of one prompt, in buffers of the run's length."""

    def __init__(self, layers: Sequence[int], tokens: int):
        self._tokens = tokens
        self._done = dict.fromkeys(layers, 0)
        self._queries: dict[int, torch.Tensor] = {}
        self._mass: dict[int, torch.Tensor] = {}
        self._options: dict[int, dict[str, Any]] = {}

    def before_attention(self, module: nn.Module) -> None:
        """Nothing to do."""

    def after_attention(self, layer: int, module: nn.Module, query, key, mask, options: dict[str, Any], kernel: str) -> None:
        """Copies the queries `[1, Hq, Q, D]`; at the prompt, sums what each key `[1, H, P, D]` received."""
        if layer not in self._done:
            return
        start, count = self._done[layer], query.shape[2]
        if start == 0:
            self._queries[layer] = query.new_empty(query.shape[1], self._tokens, query.shape[3])
            scaling = options.get("scaling")
            known = {
                "scaling": query.shape[-1] ** -0.5 if scaling is None else scaling,
                "softcap": options.get("softcap"),
                "sinks": options.get("s_aux"),
            }
            self._options[layer] = known
            self._mass[layer] = column_mass(query, key, **known)[0].unflatten(0, (key.shape[1], -1)).sum(1)
        self._queries[layer][:, start : start + count] = query[0]
        self._done[layer] = start + count

    def layer(self, index: int, keys: torch.Tensor, values: torch.Tensor) -> LayerTensors:
        """What was kept of a layer, with its keys `[H, N, D]` and values `[H, N, Dv]`."""
        options = self._options[index]
        sinks = None if options["sinks"] is None else options["sinks"].detach().clone()
        tensors = (self._queries[index], keys.contiguous(), values.contiguous(), self._mass[index])
        return LayerTensors(index, *tensors, options["scaling"], options["softcap"], sinks)
