"""Recall: facts hidden in prose, asked for after the context was compressed."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import ClassVar

from workbench.errors import UserError
from workbench.models.load import LM
from workbench.texts import prose, recall
from workbench.workloads.base import Answer, Episode, Turn, Workload, encode, register


@register
@dataclass(frozen=True)
class Recall(Workload):
    """Facts hidden in prose; each is asked for once the context is compressed. Score: share of answers fully right."""

    name: ClassVar[str] = "recall"

    facts: int = 4
    query_aware: bool = False
    """Whether the method sees the question when it compresses: the question then stands in the prompt."""

    def episodes(self, lm: LM) -> list[Episode]:
        """`samples` contexts of at most `context` tokens; one turn a fact, or one episode a fact if query-aware."""
        self.check_fits(lm, self.facts * 16)
        episodes = []
        for sample in range(self.samples):
            rng = random.Random(f"{self.seed}/{sample}")
            facts = recall.draw_facts(rng, self.facts)
            context = self._context(lm, facts, rng.getrandbits(32))
            asked = rng.sample(facts, len(facts))
            turns = [Turn(encode(lm, fact.question), encode(lm, fact.answer)) for fact in asked]
            if self.query_aware:
                episodes += [Episode(context + turn.prompt, (Turn((), turn.answer),)) for turn in turns]
            else:
                episodes.append(Episode(context, tuple(turns)))
        return episodes

    def score(self, lm: LM, answer: Answer) -> float:
        """1 if the generated text starts with the whole answer, else 0."""
        decode = lm.tokenizer.decode
        return float(decode(answer.generated).strip().startswith(decode(answer.turn.answer).strip()))

    def _context(self, lm: LM, facts: list[recall.Fact], seed: int) -> tuple[int, ...]:
        """The longest context of at most `context` tokens: as many words of prose as fit around the facts."""
        words = prose.words(seed)

        def woven(num_words: int) -> tuple[int, ...]:
            text = recall.weave(random.Random(seed), words[:num_words], facts)
            return encode(lm, text, special_tokens=True)

        fewest, most = 0, self.context
        if len(woven(fewest)) > self.context:
            raise UserError(
                f"{self.facts} facts need {len(woven(0))} tokens, more than the context of {self.context}; "
                "ask for fewer facts or a longer context."
            )
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fewest, most = (middle, most) if len(woven(middle)) <= self.context else (fewest, middle - 1)
        return woven(fewest)
