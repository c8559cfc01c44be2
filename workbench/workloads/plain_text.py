"""Plain text: how well the next words of a document are predicted after its beginning was compressed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workbench.models.load import LM
from workbench.texts import prose
from workbench.workloads.base import Answer, Episode, Turn, Workload, encode, register


@register
@dataclass(frozen=True)
class Text(Workload):
    """Standard-library prose, led along its true continuation. Score: share of its tokens predicted right."""

    name: ClassVar[str] = "text"
    forces_reference: ClassVar[bool] = True

    continuation: int = 32

    def episodes(self, lm: LM) -> list[Episode]:
        """`samples` stretches of prose of exactly `context` tokens, each with its next `continuation` tokens."""
        self.check_fits(lm, self.continuation)
        length = self.context + self.continuation
        episodes = []
        for sample in range(self.samples):
            ids = prompt_tokens(lm, length, seed=self.seed * 1000 + sample)
            episodes.append(Episode(ids[: self.context], (Turn((), ids[self.context :]),)))
        return episodes

    def score(self, lm: LM, answer: Answer) -> float:
        """Share of the continuation's tokens that were the likeliest."""
        pairs = zip(answer.predicted, answer.turn.answer, strict=True)
        return sum(guess == true for guess, true in pairs) / len(answer.turn.answer)


def prompt_tokens(lm: LM, length: int, seed: int = 0) -> tuple[int, ...]:
    """Exactly `length` tokens of standard-library prose, starting as the tokenizer starts a text."""
    return _first_tokens(lm, length, prose.words(seed))


def other_tokens(lm: LM, length: int, seed: int = 0) -> tuple[int, ...]:
    """The same of prose that the workload does not show: what methods may be fitted to."""
    return _first_tokens(lm, length, prose.known_words(seed))


def _first_tokens(lm: LM, length: int, words: list[str]) -> tuple[int, ...]:
    num_words = length
    while len(ids := encode(lm, " ".join(words[:num_words]), special_tokens=True)) < length:
        if num_words > len(words):
            words = words + words
        num_words *= 2
    return ids[:length]
