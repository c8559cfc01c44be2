"""Recall documents: facts to remember, hidden in prose, and the questions that ask for them.

A fact is one key word followed by three value words. No word stands twice among the facts of a document, so the only
way to answer is to look the fact up in the context.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from workbench.errors import UserError

WORDS = tuple(
    """
    amber anchor apple arrow autumn badger basket beacon bishop bottle branch bridge bronze bucket butter cactus camel
    candle canyon carpet castle cedar cherry circle clover cobalt copper coral cotton crystal desert diamond dragon eagle
    ember falcon feather fiddle forest fossil garden ginger granite guitar hammer harbor hazel helmet hunter indigo island
    ivory jacket jasmine jungle kettle kitten ladder lagoon lantern lemon lizard magnet maple marble meadow mirror
    monkey mountain needle nickel ocean olive orange orchid otter oyster paddle palace parrot pebble pepper pillow planet
    pocket puzzle rabbit raven ribbon river rocket saddle salmon shadow silver spider
    """.split()
)
"""The words facts are made of: concrete nouns that are rare in documentation."""

VALUE_WORDS = 3
MAX_FACTS = len(WORDS) // (1 + VALUE_WORDS)


@dataclass(frozen=True, slots=True)
class Fact:
    """One key word and the value words to be recalled from it."""

    key: str
    value: tuple[str, ...]

    @property
    def statement(self) -> str:
        """The line that states the fact in the context."""
        return f"\nRemember: {self.key} {' '.join(self.value)}.\n"

    @property
    def question(self) -> str:
        """The text that asks for the fact; the answer follows it directly."""
        return f"\nRecall: {self.key}"

    @property
    def answer(self) -> str:
        """What a correct continuation of the question starts with."""
        return f" {' '.join(self.value)}"


def draw_facts(rng: random.Random, num_facts: int) -> list[Fact]:
    """Draws facts that share no word. Raises UserError for more facts than the word list allows."""
    if not 1 <= num_facts <= MAX_FACTS:
        raise UserError(f"A recall document holds 1 to {MAX_FACTS} facts, not {num_facts}.")
    size = 1 + VALUE_WORDS
    drawn = rng.sample(WORDS, num_facts * size)
    groups = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    return [Fact(key, tuple(value)) for key, *value in groups]


def weave(rng: random.Random, words: list[str], facts: list[Fact], depth: float | None = None) -> str:
    """Puts the facts between the words: at random places, one fact in each equal stretch, or all at one share of the words."""
    if depth is not None:
        cut = round(depth * len(words))
        return " ".join(words[:cut]) + "".join(fact.statement for fact in facts) + " ".join(words[cut:])
    stretch = len(words) / len(facts)
    pieces = []
    start = 0
    for number, fact in enumerate(facts):
        cut = int(stretch * (number + rng.random()))
        pieces += [" ".join(words[start:cut]), fact.statement]
        start = cut
    return "".join(pieces) + " ".join(words[start:])
