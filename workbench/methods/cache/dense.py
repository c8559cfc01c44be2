"""Dense: keep every token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workbench.methods.base import Method, register


@register
@dataclass(frozen=True)
class Dense(Method):
    """Keeps the K and V of every token: what every other method is compared with."""

    name: ClassVar[str] = "dense"
    slot: ClassVar[str] = "cache"
    paper: ClassVar[str] = "Vaswani et al. 2017, arXiv 1706.03762"
    needs: ClassVar[frozenset[str]] = frozenset()
    acts: ClassVar[frozenset[str]] = frozenset()
    ragged: ClassVar[bool] = False
    rowwise: ClassVar[bool] = False
    observes: ClassVar[frozenset[str]] = frozenset()
    side: ClassVar[dict] = {}
    by_slot: ClassVar[bool] = False
    merges: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def capacity(self, prompt_tokens: int) -> None:
        """No bound."""

    def allocate(self, prompt_tokens: int, num_layers: int) -> None:
        """No bound in any layer."""

    def leader(self, number: int, count: int) -> None:
        """Each layer for itself."""
