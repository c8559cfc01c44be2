"""What workloads that ask about their context share: when the question is seen, how it is scored, how texts are fitted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from workbench.errors import UserError
from workbench.models.load import LM
from workbench.workloads.base import Answer, Episode, Turn, Workload


@dataclass(frozen=True)
class Questions(Workload):
    """Base of workloads that ask about the context. Score: share of answers fully right, unless a workload says otherwise."""

    query_aware: bool = False
    """Whether the method sees the question when it compresses: the question then stands in the prompt."""

    def asked(self, context: tuple[int, ...], turns: list[Turn]) -> list[Episode]:
        """One episode with all turns after the context, or one a turn with its question in the prompt if query-aware."""
        if not self.query_aware:
            return [Episode(context, tuple(turns))]
        return [Episode(context + turn.prompt, (Turn((), turn.answer, turn.depth),)) for turn in turns]

    def score(self, lm: LM, answer: Answer) -> float:
        """1 if the generated text starts with the whole answer, else 0."""
        decode = lm.tokenizer.decode
        return float(decode(answer.generated).strip().startswith(decode(answer.turn.answer).strip()))

    def longest(self, made_of: Callable[[int], tuple[int, ...]], what: str) -> tuple[int, ...]:
        """The longest `made_of(number of words)` of at most `context` tokens. Raises UserError if none is that short."""
        fewest, most = 0, self.context
        if (least := len(made_of(fewest))) > self.context:
            raise UserError(
                f"{what} {least} tokens, more than the context of {self.context}; ask for fewer facts or a longer context."
            )
        while fewest < most:
            middle = (fewest + most + 1) // 2
            fewest, most = (middle, most) if len(made_of(middle)) <= self.context else (fewest, middle - 1)
        return made_of(fewest)


def check_share(workload: Workload, name: str) -> None:
    """Raises UserError unless a setting is a share of the context."""
    value = getattr(workload, name)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise UserError(f"Workload {workload.name!r} cannot have {name}={value!r}; give a share of the context from 0 to 1.")
