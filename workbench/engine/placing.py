"""Positions by cache slot: once tokens are missing, those held close ranks, and each takes its rank for its position.

K stays in the store as it was rotated. What attention reads is a copy turned by rank less position, anew at each call, so no
error adds up and methods may be swapped. The queries are turned likewise: the newest token stands at the number held less one.
StreamingLLM, Xiao et al. 2023, arXiv 2309.17453, and H2O's streaming code, which keep K unrotated, rotate as often.
"""

from __future__ import annotations

import torch

from workbench.engine.selection import Source
from workbench.engine.stores.rectangular import RectangularStore
from workbench.probes.rotation import Rotation


def placed(query: torch.Tensor, store: RectangularStore, rotation: Rotation) -> tuple[torch.Tensor, Source] | None:
    """Queries `[B, Hq, Q, D]` of the last Q slots and what they read, by rank; None if ranks are positions still."""
    positions = store.positions
    held = positions >= 0
    ranks = positions.argsort(-1).argsort(-1) - (~held).sum(-1, keepdim=True)
    shift = (ranks - positions) * held
    if not bool(shift.any()):
        return None
    keys = rotation.moved(store.keys, shift)
    own = shift[:, :, -query.shape[2] :].repeat_interleave(query.shape[1] // keys.shape[1], 1)
    return rotation.moved(query, own), Source(keys, store.values, positions, store.occupied)
