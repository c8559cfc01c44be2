"""What a workload is: episodes of a context and its turns, all as token ids of the model at hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from workbench.errors import UserError
from workbench.models.load import LM
from workbench.registry import Registry

WORKLOADS: Registry[type[Workload]] = Registry("workload")


@dataclass(frozen=True)
class Turn:
    """What is added after the context was compressed (may be empty), and the answer hoped for."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]


@dataclass(frozen=True)
class Episode:
    """One context, prefilled and compressed once, and the turns that follow it."""

    context: tuple[int, ...]
    turns: tuple[Turn, ...]


@dataclass(frozen=True)
class Answer:
    """What a model made of a turn, freely and when led along the forced tokens."""

    turn: Turn
    generated: tuple[int, ...]
    predicted: tuple[int, ...]
    """The likeliest token at each forced position."""


@dataclass(frozen=True)
class Workload:
    """Base of all workloads: how long the contexts are, how many, and from which seed."""

    name: ClassVar[str]
    forces_reference: ClassVar[bool] = False
    """Whether fidelity is measured along the reference answer; otherwise along the dense run's own answer."""

    context: int = 512
    samples: int = 8
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("context", 16), ("samples", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise UserError(f"Workload {self.name!r} cannot have {name}={value!r}; give a whole number from {least}.")

    @classmethod
    def summary(cls) -> str:
        """One sentence: the first line of the class docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    def episodes(self, lm: LM) -> list[Episode]:
        """The episodes for a model. Raises UserError if they do not fit its context."""
        raise TypeError(f"{type(self).__name__} must make its episodes: define episodes(lm).")

    def score(self, lm: LM, answer: Answer) -> float:
        """How good an answer is, from 0 to 1."""
        raise TypeError(f"{type(self).__name__} must score an answer: define score(lm, answer).")

    def check_fits(self, lm: LM, new_tokens: int) -> None:
        """Raises UserError if the context and what follows exceed the model's context."""
        limit = lm.anatomy.max_positions
        if limit is not None and self.context + new_tokens > limit:
            raise UserError(
                f"A context of {self.context} tokens and {new_tokens} more do not fit {lm.name}, whose context is {limit}; "
                f"ask for at most {limit - new_tokens}."
            )


def register(cls: type[Workload]) -> type[Workload]:
    """Enters a workload under its name."""
    return WORKLOADS.register(cls.name)(cls)


def encode(lm: LM, text: str, special_tokens: bool = False) -> tuple[int, ...]:
    """Token ids of a text."""
    return tuple(lm.tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids)
