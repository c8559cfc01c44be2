"""What decoding methods share: the policy's defaults, and the account of who found which token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import nn

from workbench.engine.call import Call
from workbench.engine.decoding import Generated, OnToken, only_text
from workbench.engine.replacing import Forward
from workbench.methods.base import Method

if TYPE_CHECKING:
    from workbench.engine.session import Session
    from workbench.models.load import LM


@dataclass(frozen=True)
class DecodingMethod(Method):
    """A method of the decoding slot: `find` says how the next tokens are found."""

    slot: ClassVar[str] = "decoding"

    def check(self, lm: LM) -> None:
        """Raises UserError for a model the method cannot serve."""

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """What to run instead of which modules: here nothing."""
        return {}

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of FFN weights held beside the model's own: here none."""
        return 0

    def find(
        self, session: Session, room: int, ends: frozenset[int], forced: Sequence[int] | None
    ) -> tuple[list[int], list[torch.Tensor]]:
        """Adds one to `room` tokens to the only text, and says which and the logits `[1, V]` each was taken from.

        None comes after one of `ends`. With `forced`, what comes next is known and is added as if it had been found.
        """
        raise TypeError(f"{type(self).__name__} must say how tokens are found: define find(...).")

    def settled(self, session: Session) -> None:
        """Called once the tokens asked for are there: the place to bring the session and its account up to date."""

    def decode(self, session: Session, max_new_tokens: int, on_token: OnToken | None, stop_at_end: bool) -> Generated:
        """Adds tokens until the text ends or there are `max_new_tokens`."""
        only_text(session, self)
        ends = session.lm.end_tokens if stop_at_end else frozenset()
        new: list[int] = []
        while len(new) < max_new_tokens and not (new and new[-1] in ends):
            found, _ = self.find(session, max_new_tokens - len(new), ends, None)
            new += found
            if on_token is not None:
                for token in found:
                    on_token([token])
        self.settled(session)
        return Generated.of(session.lm, [new])

    def lead(self, session: Session, tokens: Sequence[int]) -> torch.Tensor:
        """Adds the tokens given. Returns the logits each would have been taken from, `[n, V]`."""
        only_text(session, self)
        taken: list[torch.Tensor] = []
        while len(taken) < len(tokens):
            _, logits = self.find(session, len(tokens) - len(taken), frozenset(), tokens[len(taken) :])
            taken += logits
        self.settled(session)
        return torch.cat(taken)


def account(session: Session, **more: int) -> dict[str, int]:
    """Adds to the counts in the trace's meta under `decoding`, and returns them."""
    writer = session.call.writer
    before = writer.meta.get("decoding", {})
    counts = {**before, **{name: before.get(name, 0) + number for name, number in more.items()}}
    writer.update_meta(decoding=counts)
    return counts
