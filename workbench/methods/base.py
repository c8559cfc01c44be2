"""What a method is: a published technique as a frozen dataclass of knobs, in one file, in one slot."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Self

from workbench.engine.setup import Setup
from workbench.errors import UserError
from workbench.registry import Registry

if TYPE_CHECKING:
    import torch

    from workbench.engine.calibration import Calibration, Samples

SLOTS = ("cache", "attention", "routing", "decoding", "reuse")

METHODS: Registry[type[Method]] = Registry("method")

Budget = float | int
"""What a cache method may keep: a float in (0, 1] is a fraction of the prompt, an int is tokens a layer and kv head."""


@dataclass(frozen=True)
class Method:
    """Base of all methods. The first docstring line of a method's file is its summary in every list and form."""

    name: ClassVar[str]
    slot: ClassVar[str]
    paper: ClassVar[str]
    deviations: ClassVar[tuple[str, ...]] = ()

    calibrated_by: ClassVar[tuple[str, ...] | None] = None
    """The knobs its calibration depends on; None for a method that has none."""
    calibrated_on: ClassVar[str] = "recall"
    """The texts it is calibrated on if none are given: `recall`, or `recall and prose` where next-token losses matter."""
    calibration: ClassVar[Calibration | None] = None
    """What its calibration found for the model at hand: see `with_calibration`."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(self, field))

    @classmethod
    def summary(cls) -> str:
        """One sentence: the first line of the class docstring."""
        return (cls.__doc__ or "").strip().splitlines()[0]

    @property
    def needs_calibration(self) -> bool:
        """Whether it runs only on a model it was calibrated for."""
        return self.calibrated_by is not None

    def calibration_knobs(self) -> dict[str, Any]:
        """The knobs its calibration depends on, and their values."""
        return {name: getattr(self, name) for name in self.calibrated_by or ()}

    @classmethod
    def to_calibrate(cls) -> tuple[Self, ...]:
        """The method with default knobs as far as these need a calibration: once, or once for each way it has."""
        return () if cls.calibrated_by is None else (cls(),)

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """Makes the tables. Samples may be gone through more than once; each time runs the model over the texts."""
        raise TypeError(f"{type(self).__name__} must say how it is calibrated: define calibrate(samples).")

    def with_calibration(self, calibration: Calibration) -> Self:
        """A copy that knows its calibration. Sessions, comparisons and replays make it themselves."""
        known = dataclasses.replace(self)  # no copy, which would hold on to what followed from another calibration
        object.__setattr__(known, "calibration", calibration)
        return known

    @property
    def tables(self) -> Mapping[str, torch.Tensor]:
        """The tables of the calibration at hand."""
        if self.calibration is None:
            raise UserError(f"{self.name!r} does not know its calibration; use with_calibration(wb.calibrate(lm, method)).")
        return self.calibration.tables

    @property
    def label(self) -> str:
        """The name with its knobs that differ from their defaults, such as `h2o(budget=0.2)`."""
        given = [
            f"{field.name}={getattr(self, field.name)}"
            for field in dataclasses.fields(self)
            if field.name == "budget" or getattr(self, field.name) != field.default
        ]
        return f"{self.name}({', '.join(given)})" if given else self.name


def register(cls: type[Method]) -> type[Method]:
    """Enters a method class under its `name`; that is all it takes to add a method."""
    if cls.slot not in SLOTS:
        raise ValueError(f"{cls.__qualname__} has slot {cls.slot!r}; the slots are {', '.join(SLOTS)}.")
    return METHODS.register(cls.name)(cls)


def knob(
    default: Any, *, low: float | None = None, high: float | None = None, choices: tuple = (), unit: str = "", help: str = ""
) -> Any:
    """A dataclass field with what a form needs to know: range or choices, unit, and one sentence of help."""
    return dataclasses.field(
        default=default, metadata={"low": low, "high": high, "choices": choices, "unit": unit, "help": help}
    )


def budget_knob(default: Budget) -> Any:
    """The knob every cache method has."""
    return knob(default, unit="fraction or tokens", help="Kept KV: a fraction (0, 1] of the prompt, or tokens a kv head.")


def read_budget_knob(default: Budget) -> Any:
    """The same knob of a method that selects: what it reads, not what it keeps."""
    return knob(
        default, unit="fraction or tokens", help="KV read a decode step: a fraction (0, 1] of the prompt, or tokens a kv head."
    )


def describe(cls: type[Method]) -> dict[str, Any]:
    """A method class as data: name, slot, summary, paper, knobs, deviations."""
    knobs = [
        {
            "name": field.name,
            "default": field.default,
            "low": field.metadata.get("low"),
            "high": field.metadata.get("high"),
            "unit": field.metadata.get("unit", ""),
            "help": field.metadata.get("help", ""),
            **({"choices": list(field.metadata["choices"])} if field.metadata.get("choices") else {}),
        }
        for field in dataclasses.fields(cls)
    ]
    return {
        "name": cls.name,
        "slot": cls.slot,
        "summary": cls.summary(),
        "paper": cls.paper,
        "knobs": knobs,
        "deviations": list(cls.deviations),
        "calibrated_by": None if cls.calibrated_by is None else list(cls.calibrated_by),
    }


def markdown_table() -> str:
    """All registered methods as the table the README shows."""
    rows = [("method", "slot", "what it does", "paper"), ("---",) * 4]
    rows += [(f"`{cls.name}`", cls.slot, cls.summary(), cls.paper) for cls in METHODS.values()]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def parse_method(text: str) -> Method:
    """Reads `name:knob=value,knob=value`. Raises UserError for an unknown method or knob, or a value out of range."""
    name, _, listed = text.strip().partition(":")
    cls = METHODS[name]
    known = {field.name: field for field in dataclasses.fields(cls)}
    given = {}
    for item in filter(None, listed.split(",")):
        key, equals, value = item.partition("=")
        if key not in known:
            knobs = f"its knobs are {', '.join(known)}" if known else "it has no knobs"
            raise UserError(f"Method {name!r} has no knob {key!r}; {knobs}.")
        if not equals or not value:
            raise UserError(f"Knob {key!r} of {name!r} needs a value, as in {key}={known[key].default}.")
        given[key] = value if isinstance(known[key].default, str) else _parse_value(name, key, value)
    return cls(**given)


def parse_setup(text: str) -> Setup:
    """Reads methods of several slots, as in `snapkv:budget=0.2 + top-k:k=1`, or one. Raises UserError as `parse_method`."""
    return Setup(*map(parse_method, re.split(r"\s*\+\s*(?=[^\d\s])", text.strip())))


def resolve_budget(budget: Budget, prompt_tokens: int) -> int:
    """Tokens a kv head may keep for a prompt: at least one."""
    return budget if isinstance(budget, int) else max(1, round(budget * prompt_tokens))


def _parse_value(method: str, key: str, value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    if value.endswith("%"):
        share = value.removesuffix("%")
        if not share.replace(".", "", 1).isdigit() or not 0 < float(share) <= 100:
            raise UserError(f"Knob {key!r} of {method!r} cannot be {value!r}; write a percentage above 0% and up to 100%.")
        return float(share) / 100
    return {"true": True, "false": False}.get(value.lower(), value)


def _checked(method: Method, field: dataclasses.Field) -> Any:
    value = getattr(method, field.name)
    where = f"Knob {field.name!r} of {method.name!r}"
    if field.name == "budget":
        return _checked_budget(where, value)
    choices, low, high = (field.metadata.get(key) for key in ("choices", "low", "high"))
    if choices and value not in choices:
        raise UserError(f"{where} cannot be {value!r}; choose {' or '.join(map(repr, choices))}.")
    if isinstance(field.default, bool):
        if not isinstance(value, bool):
            raise UserError(f"{where} cannot be {value!r}; it is true or false.")
        return value
    if isinstance(field.default, float) and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if not isinstance(value, type(field.default)) or isinstance(value, bool):
        raise UserError(f"{where} cannot be {value!r}; it takes {_KINDS.get(type(field.default), 'another kind of value')}.")
    if (low is not None and value < low) or (high is not None and value > high) or value != value:
        bounds = f"from {low} to {high}" if high is not None else f"{low} or more"
        raise UserError(f"{where} cannot be {value!r}; it takes {_KINDS[type(field.default)]} {bounds}.")
    return value


_KINDS = {int: "a whole number", float: "a number", str: "a word"}


def _checked_budget(where: str, value: Any) -> Budget:
    meaning = "write a fraction of the prompt in (0, 1], such as 0.2, or a whole number of tokens, such as 128"
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise UserError(f"{where} cannot be {value!r}; {meaning}.")
    fits = value >= 1 if isinstance(value, int) else 0 < value <= 1
    if not fits:
        raise UserError(f"{where} cannot be {value!r}; {meaning}.")
    return value
