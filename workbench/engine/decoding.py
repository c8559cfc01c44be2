"""The decoding slot: how next tokens are found. `Session.generate` hands over to the method of this slot.

A method runs tokens that may be taken back (`Session.attempt`, `take_back`, `settle`), or lets another model's session write
part of the text (`Session.partner`, `defer`). It decodes one text at a time, and beside a cache method that keeps every token:
what was evicted could not be brought back with a token that is.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

from workbench.engine.call import Call
from workbench.engine.policy import CachePolicy
from workbench.engine.replacing import Forward, RoutingPolicy
from workbench.errors import UserError

if TYPE_CHECKING:
    from workbench.engine.session import Session
    from workbench.models.load import LM

OnToken = Callable[[list[int]], None]

_LONG = 1 << 20


@dataclass(frozen=True)
class Generated:
    """What a call of `generate` added: token ids and text of each batch row, ended at the row's end of sequence."""

    ids: tuple[tuple[int, ...], ...]
    texts: tuple[str, ...]

    @classmethod
    def of(cls, lm: LM, rows: Sequence[Sequence[int]]) -> Generated:
        """From the new token ids of each row."""
        texts = [lm.tokenizer.decode(row, skip_special_tokens=True) for row in rows]
        return cls(tuple(map(tuple, rows)), tuple(texts))

    @property
    def text(self) -> str:
        """The text of the only row. Raises UserError for a batch."""
        if len(self.texts) != 1:
            raise UserError(f"This is a batch of {len(self.texts)} rows; read `texts`.")
        return self.texts[0]


class DecodingPolicy(Protocol):
    """A decoding method as the engine uses it."""

    name: str

    def check(self, lm: LM) -> None:
        """Raises UserError for a model the method cannot serve, before anything runs."""
        ...

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """What to run instead of which modules, in all of a session's calls; `call.phase` says which kind each is."""
        ...

    def decode(self, session: Session, max_new_tokens: int, on_token: OnToken | None, stop_at_end: bool) -> Generated:
        """Adds tokens to the only text of a session: see `Session.generate`."""
        ...

    def lead(self, session: Session, tokens: Sequence[int]) -> torch.Tensor:
        """Adds the tokens given, as it would have found them. Returns the logits each would have been taken from, `[n, V]`."""
        ...

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of FFN weights the method holds beside the model's own."""
        ...


def check_decoding(
    lm: LM, policy: DecodingPolicy | None, cache: CachePolicy | None, routing: RoutingPolicy | None = None
) -> None:
    """Raises UserError for a decoding method that does not go with the model or with the methods beside it."""
    if policy is None:
        return
    if cache is not None and cache.capacity(_LONG) is not None:
        raise UserError(
            f"{policy.name!r} takes tokens back or has them written by another model, which does not go with {cache.name!r}, a "
            "cache method that does not keep or read every token; leave one of them out."
        )
    if getattr(routing, "leaves_out", False):
        raise UserError(
            f"{policy.name!r} takes tokens back or has them written by another model, which does not go with {routing.name!r}, "
            "some of whose layers hold only some of the tokens; leave one of them out."
        )
    policy.check(lm)


def only_text(session: Session, policy: DecodingPolicy) -> None:
    """Raises UserError for a batch."""
    if len(session.tokens) > 1:
        raise UserError(f"{policy.name!r} decodes one text at a time, and this session has {len(session.tokens)}; give one.")
