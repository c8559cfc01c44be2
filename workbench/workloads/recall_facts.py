"""Recall: facts hidden in prose, asked for after the context was compressed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from workbench.models.load import LM
from workbench.texts import prose, recall
from workbench.workloads.base import Episode, Turn, encode, register
from workbench.workloads.questions import Questions, check_share


@register
@dataclass(frozen=True)
class Recall(Questions):
    """Facts hidden in prose; each is asked for once the context is compressed. Score: share of answers fully right.

    Several facts are several questions about one context, compressed once: `facts=5` asks five.
    """

    name: ClassVar[str] = "recall"

    facts: int = 4
    depth: float | None = None
    """Where the facts stand, all together, as a share of the prose; None spreads them over equal stretches of it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.depth is not None:
            check_share(self, "depth")

    def episodes(self, lm: LM) -> list[Episode]:
        """`samples` contexts of at most `context` tokens; one turn a fact, or one episode a fact if query-aware."""
        self.check_fits(lm, self.facts * 16)
        episodes = []
        for sample in range(self.samples):
            rng = random.Random(f"{self.seed}/{sample}")
            facts = recall.draw_facts(rng, self.facts)
            context = self._context(lm, facts, rng.getrandbits(32))
            asked = rng.sample(facts, len(facts))
            depths = {fact.key: self._depth(number) for number, fact in enumerate(facts)}
            turns = [Turn(encode(lm, fact.question), encode(lm, fact.answer), depths[fact.key]) for fact in asked]
            episodes += self.asked(context, turns)
        return episodes

    def _depth(self, number: int) -> int:
        """Percent of the context before a fact: the middle of its stretch, as it may stand anywhere in that."""
        share = (number + 0.5) / self.facts if self.depth is None else self.depth
        return round(100 * share)

    def _context(self, lm: LM, facts: list[recall.Fact], seed: int) -> tuple[int, ...]:
        """The longest context of at most `context` tokens: as many words of prose as fit around the facts."""
        words = prose.words(seed)

        def woven(num_words: int) -> tuple[int, ...]:
            text = recall.weave(random.Random(seed), words[:num_words], facts, self.depth)
            return encode(lm, text, special_tokens=True)

        return self.longest(woven, f"{self.facts} facts need")
