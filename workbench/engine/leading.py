"""Layers that choose for others: what one keeps and reads, the one that follows it keeps and reads in the same call.

A follower scores nothing and needs no bounds on pages. Choices are masks over slots, so leader and follower have to hold the
same tokens; if they do when they are appointed they always will, since both keep the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from workbench.engine.policy import CachePolicy
from workbench.errors import UserError

if TYPE_CHECKING:
    from workbench.engine.cache import EngineLayer


def leaders(layers: Sequence[EngineLayer], policy: CachePolicy | None) -> dict[EngineLayer, EngineLayer]:
    """Which of the layers a policy acts on, first to last, follows which.

    Raises UserError if two such layers differ in their number of kv heads.
    """
    found = {}
    for number, layer in enumerate(layers):
        chosen = policy.leader(number, len(layers)) if policy is not None else None
        if chosen is None:
            continue
        leader = layers[chosen]
        heads = leader.attention.num_kv_heads, layer.attention.num_kv_heads
        if len(set(heads)) > 1:
            raise UserError(
                f"{policy.name!r} lets layer {layer.index} take the choices of layer {leader.index}, but they have {heads[1]} "
                f"and {heads[0]} kv heads; let each layer choose for itself."
            )
        found[layer] = leader
    return found


def appoint(following: Mapping[EngineLayer, EngineLayer]) -> None:
    """Tells layers whom they follow; one that another method has left with other tokens than its leader does not."""
    for layer, leader in following.items():
        if not _alike(leader, layer):
            continue
        layer.leader, leader.leads = leader.index, True
        if layer.pages is not None:
            layer.pages.bounded = False


def _alike(leader: EngineLayer, layer: EngineLayer) -> bool:
    """Whether both hold the same tokens in the same slots."""
    if not leader.get_seq_length():
        return True
    return torch.equal(leader.store.positions, layer.store.positions)
