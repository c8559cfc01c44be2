"""Banks of experts made once: a comparison makes many sessions of one method, and cutting or quantising takes long.

Kept by model as long as that lives, for the same method with the same calibration on the same weights and device.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from workbench.engine.calibration import Calibration
from workbench.engine.experts import Bank
from workbench.models.fingerprint import fingerprint

if TYPE_CHECKING:
    from workbench.models.load import LM

_HELD = 2
"""Methods a model keeps banks of: two may take turns, and a sweep over knobs leaves no more than these behind."""


class Maker(Protocol):
    """A method that puts banks in the place of experts; equal ones have equal knobs."""

    calibration: Calibration | None

    def banks(self, lm: LM) -> Mapping[int, Bank]:
        """Makes them."""
        ...


@dataclass(frozen=True)
class _Made:
    maker: Maker
    weights: tuple[str | None, torch.device]
    banks: Mapping[int, Bank]


_made: weakref.WeakKeyDictionary[nn.Module, list[_Made]] = weakref.WeakKeyDictionary()


@torch.no_grad()
def banks_of(maker: Maker, lm: LM) -> Mapping[int, Bank]:
    """A method's banks for a model, by layer. They must not hold on to the model, only to its parts."""
    weights = (fingerprint(lm), lm.device)
    held = _made.setdefault(lm.model, [])
    found = next((each for each in held if each.weights == weights and _same(each.maker, maker)), None)
    if found is None:
        found = _Made(maker, weights, maker.banks(lm))
        held = _made[lm.model]  # a maker may have asked for what it shares with others
    _made[lm.model] = [*(each for each in held if each is not found), found][-_HELD:]
    return found.banks


def _same(one: Maker, other: Maker) -> bool:
    if one != other:
        return False
    known, given = one.calibration, other.calibration
    if known is None or given is None or known is given:
        return known is given
    tables, others = known.tables, given.tables
    return tables.keys() == others.keys() and all(torch.equal(tables[name], others[name]) for name in tables)
