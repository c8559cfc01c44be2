"""What a workload is: episodes of a context and its turns, all as token ids of the model at hand."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from workbench.errors import UserError
from workbench.models.load import LM
from workbench.registry import Registry

WORKLOADS: Registry[type[Workload]] = Registry("workload")


@dataclass(frozen=True)
class Turn:
    """What is added after the context was compressed (may be empty), and the answer hoped for."""

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    depth: int | None = None
    """Where in the context the answer stands, in percent, if it stands somewhere."""


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
        check_whole(self, "context", 16)
        check_whole(self, "samples", 1)

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


def check_whole(workload: Workload, name: str, least: int) -> None:
    """Raises UserError unless a setting is a whole number of at least `least`."""
    value = getattr(workload, name)
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise UserError(f"Workload {workload.name!r} cannot have {name}={value!r}; give a whole number from {least}.")


def parse_workload(text: str, **settings: Any) -> Workload:
    """Reads `name:setting=value,setting=value`; further settings may be given. Raises UserError for what there is not."""
    name, _, listed = text.strip().partition(":")
    cls = WORKLOADS[name]
    known = {field.name: field for field in dataclasses.fields(cls)}
    for item in filter(None, listed.split(",")):
        key, equals, value = item.partition("=")
        if not equals or not value:
            raise UserError(f"Setting {key!r} of workload {name!r} needs a value, as in {key}=1.")
        settings[key] = _value(value)
    for key in settings:
        if key not in known:
            raise UserError(f"Workload {name!r} has no setting {key!r}; its settings are {', '.join(known)}.")
    return cls(**settings)


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def register(cls: type[Workload]) -> type[Workload]:
    """Enters a workload under its name."""
    return WORKLOADS.register(cls.name)(cls)


def encode(lm: LM, text: str, special_tokens: bool = False) -> tuple[int, ...]:
    """Token ids of a text."""
    return tuple(lm.tokenizer(text, add_special_tokens=special_tokens, verbose=False).input_ids)
