"""A setup: the methods chosen together, at most one a slot. The empty setup is dense."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cached_property
from typing import TYPE_CHECKING, Protocol

from workbench.engine.calibration import ready
from workbench.engine.decoding import DecodingPolicy, check_decoding
from workbench.engine.policy import CachePolicy
from workbench.engine.replacing import RoutingPolicy
from workbench.errors import UserError

if TYPE_CHECKING:
    from workbench.models.load import LM


class Method(Protocol):
    """A method as the engine knows it."""

    slot: str
    label: str


class Setup:
    """The methods of one run."""

    def __init__(self, *methods: Method):
        self.methods: dict[str, Method] = {}
        for method in methods:
            if not hasattr(method, "slot"):
                raise UserError(f"{method!r} is not a method; pass an object such as H2O(budget=0.2).")
            if method.slot in self.methods:
                raise UserError(
                    f"A setup has one method a slot, and {self.methods[method.slot].name!r} and {method.name!r} "
                    f"are both {method.slot} methods; compare them in two setups."
                )
            self.methods[method.slot] = method

    @classmethod
    def of(cls, given: Setup | Method | Iterable[Method] | None) -> Setup:
        """A setup from whatever names one: a setup, a method, several of them, or None for dense."""
        if isinstance(given, Setup):
            return given
        if given is None:
            return cls()
        return cls(*given) if isinstance(given, Iterable) and not isinstance(given, str) else cls(given)

    def ready(self, lm: LM) -> Setup:
        """The same setup, whose methods know their calibrations for a model.

        Raises UserError if one is missing, and first for a model or a companion that a method cannot do with, which no
        calibration would help.
        """
        if self.routing is not None:
            self.routing.check(lm.anatomy)
        check_decoding(lm, self.decoding, self.cache, self.routing)
        return Setup(*(ready(method, lm) for method in self.methods.values()))

    @property
    def cache(self) -> CachePolicy | None:
        """The method in the cache slot."""
        return self.methods.get("cache")

    @property
    def routing(self) -> RoutingPolicy | None:
        """The method in the routing slot."""
        return self.methods.get("routing")

    @property
    def decoding(self) -> DecodingPolicy | None:
        """The method in the decoding slot."""
        return self.methods.get("decoding")

    @property
    def replacing(self) -> list[RoutingPolicy | DecodingPolicy]:
        """The methods that replace forwards of modules."""
        return [policy for policy in (self.routing, self.decoding) if policy is not None]

    @cached_property
    def label(self) -> str:
        """What the setup is called in tables and figures."""
        return " + ".join(method.label for method in self.methods.values()) or "dense"

    def __repr__(self) -> str:
        return f"Setup({', '.join(map(repr, self.methods.values()))})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Setup) and self.methods == other.methods

    def __hash__(self) -> int:
        return hash(tuple(self.methods.values()))
