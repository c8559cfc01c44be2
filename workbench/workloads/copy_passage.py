"""Copy: a passage early in the context is begun again after the compression, and is to be continued word for word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workbench.errors import UserError
from workbench.models.load import LM
from workbench.workloads.base import Answer, Episode, Turn, check_whole, register
from workbench.workloads.plain_text import prompt_tokens
from workbench.workloads.questions import Questions, check_share


@register
@dataclass(frozen=True)
class Copy(Questions):
    """A passage of the context is begun again and is to be continued word for word. Score: share copied before an error."""

    name: ClassVar[str] = "copy"
    forces_reference: ClassVar[bool] = True

    depth: float = 0.1
    """Where the passage starts, as a share of the context."""
    cue: int = 16
    """Tokens of the passage that are given again."""
    passage: int = 32
    """Tokens that are to follow."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_share(self, "depth")
        check_whole(self, "cue", 1)
        check_whole(self, "passage", 1)
        if self.cue + self.passage > self.context:
            raise UserError(
                f"A cue of {self.cue} and a passage of {self.passage} tokens are not within a context of {self.context}; "
                "shorten them."
            )

    def episodes(self, lm: LM) -> list[Episode]:
        """`samples` stretches of prose of exactly `context` tokens, and the start of one passage of each."""
        self.check_fits(lm, self.cue + self.passage)
        found = []
        for sample in range(self.samples):
            context = prompt_tokens(lm, self.context, seed=self.seed * 1000 + sample)
            start = self._start(context)
            end = start + self.cue
            turn = Turn(context[start:end], context[end : end + self.passage], round(100 * self.depth))
            found += self.asked(context, [turn])
        return found

    def score(self, lm: LM, answer: Answer) -> float:
        """Share of the passage's tokens generated before the first wrong one."""
        right = 0
        for made, true in zip(answer.generated, answer.turn.answer, strict=False):
            if made != true:
                break
            right += 1
        return right / len(answer.turn.answer)

    def _start(self, context: tuple[int, ...]) -> int:
        """The first place from the depth on, or the last before it, whose cue stands nowhere else."""
        last = len(context) - self.cue - self.passage
        wished = min(round(self.depth * len(context)), last)
        places = [*range(wished, last + 1), *range(wished - 1, -1, -1)]
        windows = [context[start : start + self.cue] for start in range(len(context) - self.cue + 1)]
        for start in places:
            if windows.count(windows[start]) == 1:
                return start
        raise UserError(f"No {self.cue} tokens of the context stand in it only once; give a longer cue.")
