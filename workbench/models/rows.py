"""Training rows of the built-in models: copying, recall and plain prose, each token marked with the task it counts for."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from workbench.texts import prose, recall


def training_documents() -> list[str]:
    """The prose the models may learn from: all but the held-out tenth."""
    return [document for document in (*prose.topics(), *prose.docstrings()) if not prose.is_held_out(document)]


@dataclass
class Row:
    """Token ids, and for each the task whose loss counts its prediction ('' for none)."""

    ids: list[int]
    tasks: list[str] = field(repr=False)


class Rows:
    """Makes training rows. `held_out=True` takes the prose no model has seen."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, seed: int, held_out: bool = False):
        self.tokenizer = tokenizer
        self.rng = random.Random(seed)
        documents = prose.held_out_topics() if held_out else training_documents()
        documents = list(documents)
        self.rng.shuffle(documents)
        self.words = " ".join(documents).split(" ")
        self.stream = self._encode(" ".join(documents))
        self.bos, self.pad = tokenizer.bos_token_id, tokenizer.pad_token_id
        distinct = sorted(set(self.words))
        encoded = tokenizer([f" {word}" for word in distinct], add_special_tokens=False).input_ids
        self.word_tokens = {word: len(ids) for word, ids in zip(distinct, encoded, strict=True)}

    def row(self, task: str, length: int, num_facts: int | None = None) -> Row:
        """One row of a task, exactly `length` tokens."""
        make = {"copy": self._copy, "recall": self._recall, "text": self._text}[task]
        return make(length, num_facts) if task == "recall" else make(length)

    def _text(self, length: int) -> Row:
        start = self.rng.randrange(len(self.stream) - length)
        return Row([self.bos, *self.stream[start : start + length - 1]], ["text"] * length)

    def _copy(self, length: int) -> Row:
        """Random segments among prose, each repeated once; the repeat counts from its second token on."""
        segments = []
        for _ in range(max(1, length // 48)):
            size = self.rng.randint(4, 8)
            segments.append([self.rng.randrange(2, len(self.tokenizer)) for _ in range(size)])
        planted = [(s, tag) for s in range(len(segments)) for tag in (0, 1)]
        self.rng.shuffle(planted)
        free = length - 1 - sum(2 * len(segment) for segment in segments)
        cuts = sorted(self.rng.randint(0, free) for _ in planted)
        start = self.rng.randrange(len(self.stream) - length)
        filler = self.stream[start : start + free]
        ids, tasks, seen, done = [self.bos], [""], set(), 0
        for (number, _), cut in zip(planted, cuts, strict=True):
            ids += filler[done:cut]
            tasks += [""] * (cut - done)
            done = cut
            ids += segments[number]
            repeated = number in seen
            tasks += ["", *["copy" if repeated else ""] * (len(segments[number]) - 1)]
            seen.add(number)
        ids += filler[done:]
        tasks += [""] * (free - done)
        return Row(ids, tasks)

    def _recall(self, length: int, num_facts: int | None = None) -> Row:
        """Facts woven into prose, then all of them asked for in another order; the answers count."""
        facts = recall.draw_facts(self.rng, num_facts or self.rng.randint(1, max(1, min(8, length // 32))))
        asked = self.rng.sample(facts, len(facts))
        turns = [(self._encode(fact.question), self._encode(fact.answer + ".")) for fact in asked]
        tail = sum(len(question) + len(answer) for question, answer in turns)
        fact_tokens = sum(len(self._encode(fact.statement)) for fact in facts)
        budget = length - 1 - tail - fact_tokens - 3 * len(facts)
        start = self.rng.randrange(len(self.words) - length)
        words = []
        for word in self.words[start : start + length]:
            budget -= self.word_tokens[word]
            if budget < 0:
                break
            words.append(word)
        ids = [self.bos, *self._encode(recall.weave(self.rng, words, facts))]
        tasks = [""] * len(ids)
        for question, answer in turns:
            ids += question + answer
            tasks += [""] * len(question) + ["recall"] * len(answer)
        ids, tasks = ids[:length], tasks[:length]
        room = length - len(ids)
        return Row(ids + [self.pad] * room, tasks + [""] * room)

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids
