"""How a layer rotates queries and keys by position (RoPE, Su et al. 2021, arXiv 2104.09864), found by trying.

A prompt of one token repeated gives a layer the same query at every position, but for the rotation. So the layer's
rotation is the one that turns those queries back into one vector. It is searched among the frequencies the model holds.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from workbench.errors import UserError
from workbench.probes.attention import AttentionProbe
from workbench.probes.unobserved import unobserved

_LENGTH = 16
_TOLERANCE = 5e-2
"""Wide enough for half precision; a wrong rotation is off by about one."""


@dataclass(frozen=True)
class Rotation:
    """The first `2 P` elements of a head, as P planes that turn with the position; the other elements stand still."""

    frequencies: torch.Tensor
    """`[P]` radians a position. Where they change with the length (dynamic NTK, LongRoPE), those of a short prompt."""
    interleaved: bool = False
    """Whether a plane holds neighbours, (0, 1), (2, 3) …, instead of (0, P), (1, P + 1) …"""

    def undone(self, states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        """States `[B, H, Q, D]` of tokens at `positions` `[B, Q]` as they were before they were rotated."""
        angles = positions[:, None, :, None] * self.frequencies
        return self._turned(states, angles.cos(), -angles.sin())

    def moved(self, states: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """States `[B, H, Q, D]`, rotated, as if each stood `by` `[B, H, Q]` positions further on."""
        angles = by[..., None] * self.frequencies
        return self._turned(states, angles.cos(), angles.sin()).to(states.dtype)

    def averaged(self, states: torch.Tensor, first: torch.Tensor, count: int) -> torch.Tensor:
        """States `[B, H, Q, D]`, not yet rotated: their mean over `count` positions from `first` `[B]` on."""
        positions = first.view(-1, 1) + torch.arange(count, device=first.device)
        angles = positions[..., None] * self.frequencies
        return self._turned(states, angles.cos().mean(1)[:, None, None], angles.sin().mean(1)[:, None, None])

    def _turned(self, states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        turning, still = states.tensor_split([2 * len(self.frequencies)], -1)
        x, y = (turning[..., 0::2], turning[..., 1::2]) if self.interleaved else turning.chunk(2, -1)
        x, y = x * cos - y * sin, y * cos + x * sin
        turned = torch.stack([x, y], -1).flatten(-2) if self.interleaved else torch.cat([x, y], -1)
        return torch.cat([turned, still], -1)


_found: weakref.WeakKeyDictionary[nn.Module, list[tuple[float, Rotation]]] = weakref.WeakKeyDictionary()


def rotations(model: nn.Module, layers: list[int]) -> dict[int, Rotation]:
    """The rotation of each of these layers. Raises UserError if one does not rotate by frequencies the model holds."""
    if model not in _found:
        _found[model] = [_likeliest(queries, _candidates(model)) for queries in _repeated_queries(model)]
    for layer in layers:
        gap, _ = _found[model][layer]
        if not gap <= _TOLERANCE:
            raise UserError(
                f"It is unknown how layer {layer} of {type(model).__name__} rotates its queries (the best guess is off by "
                f"{gap:.0%}), and this cache method has to know; choose another."
            )
    return {layer: _found[model][layer][1] for layer in layers}


def _candidates(model: nn.Module) -> list[Rotation]:
    """No rotation, and every table of frequencies in both layouts."""
    tables = {name: buffer for name, buffer in model.named_buffers() if name.endswith("inv_freq") and "original" not in name}
    none = Rotation(torch.zeros(0, device=next(model.parameters()).device))
    return [none, *(Rotation(table.float(), layout) for table in tables.values() for layout in (False, True))]


def _likeliest(queries: torch.Tensor, candidates: list[Rotation]) -> tuple[float, Rotation]:
    """The candidate under which the queries `[1, Hq, Q, D]` are most alike, and how far from it they are."""
    positions = torch.arange(queries.shape[2], device=queries.device)[None]
    gaps = []
    for rotation in candidates:
        if 2 * len(rotation.frequencies) <= queries.shape[-1]:
            before = rotation.undone(queries, positions)
            gap = (before - before[:, :, :1]).abs().max() / queries.abs().max()
            gaps.append((float(gap), rotation))
    return min(gaps, key=lambda pair: pair[0])


class _Queries:
    """Holds the queries of each layer's attention call."""

    def __init__(self) -> None:
        self.by_layer: dict[int, torch.Tensor] = {}

    def before_attention(self, module: nn.Module) -> None:
        """Nothing to do."""

    def after_attention(self, layer: int, module: nn.Module, query, key, mask, options: dict[str, Any], kernel: str) -> None:
        """Holds the queries."""
        self.by_layer[layer] = query.float()


@torch.no_grad()
def _repeated_queries(model: nn.Module) -> list[torch.Tensor]:
    """Every layer's queries `[1, Hq, Q, D]` over a prompt of one token repeated."""
    held = _Queries()
    probe = AttentionProbe(model, held)
    ids = torch.full((1, _LENGTH), 2, device=next(model.parameters()).device)
    with unobserved():
        probe.attach()
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False)
        finally:
            probe.detach()
    return [held.by_layer[layer] for layer in sorted(held.by_layer)]
