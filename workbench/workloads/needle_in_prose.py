"""Needle: one plain sentence hidden in prose at a chosen depth, asked for after the context was compressed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from workbench.models.load import LM
from workbench.texts import prose, recall
from workbench.workloads.base import Episode, Turn, check_whole, encode, register
from workbench.workloads.questions import Questions

_DIGITS = 5


@register
@dataclass(frozen=True)
class Needle(Questions):
    """One sentence with a number hidden in prose, at evenly spaced depths. Score: share of numbers given back whole."""

    name: ClassVar[str] = "needle"

    depths: int = 5
    """How many depths, from the start of the context to its end; there are `samples` contexts for each."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole(self, "depths", 1)

    def episodes(self, lm: LM) -> list[Episode]:
        """For each depth, `samples` contexts of at most `context` tokens with one needle and one question."""
        self.check_fits(lm, 32)
        shares = [number / (self.depths - 1) for number in range(self.depths)] if self.depths > 1 else [0.5]
        return [each for share in shares for sample in range(self.samples) for each in self._episode(lm, share, sample)]

    def _episode(self, lm: LM, share: float, sample: int) -> list[Episode]:
        rng = random.Random(f"{self.seed}/{sample}")  # the same needle in the same prose at every depth
        claim = f"The access code of the {rng.choice(recall.WORDS)} is"
        code = " " + "".join(rng.choices("0123456789", k=_DIGITS))
        words = prose.words(rng.getrandbits(32))

        def hidden(num_words: int) -> tuple[int, ...]:
            text = " ".join(words[:num_words])
            cut = text.rfind(" ", 0, round(share * len(text))) if share < 1 else len(text)
            return encode(lm, f"{text[: max(0, cut)]}\n{claim}{code}.\n{text[max(0, cut) :]}", special_tokens=True)

        turn = Turn(encode(lm, f"\n{claim}"), encode(lm, code), round(100 * share))
        return self.asked(self.longest(hidden, "The needle alone takes"), [turn])
