"""What a method has learnt about a model once and for all: small tensors, and the texts they are learnt from.

A method says which of its knobs its calibration depends on, and makes the tensors from samples: texts as a dense run of the
model saw them. Kept they are in the user's cache directory by the model's fingerprint, and beside the built-in models.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workbench.engine.policy import LayerState
from workbench.errors import UserError
from workbench.folders import cache_directory
from workbench.models.fingerprint import fingerprint
from workbench.models.load import BUILTIN

if TYPE_CHECKING:
    from workbench.models.load import LM

_FOLDER = "calibrations"
_FORMAT = "1"


@dataclass(frozen=True)
class Needle:
    """A passage of a text that is repeated later: where it stands, and the tokens from which it is predicted again."""

    start: int
    stop: int
    asking: tuple[int, ...]
    """Position of the token before each repeated one: the query there has to find the passage."""


@dataclass(frozen=True)
class Document:
    """A calibration text: a prompt, and how it goes on."""

    tokens: tuple[int, ...]
    prompt_tokens: int
    needles: tuple[Needle, ...] = ()


@dataclass(frozen=True)
class Sample:
    """A document as one dense forward call over all its tokens saw it."""

    document: Document
    layers: tuple[LayerState, ...] = field(repr=False)
    """The layers a method acts on, first to last; a batch of one row, queries and mass included."""
    projections: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = field(repr=False)
    """The output projection of each, `[..., Hq x Dv]` to `[..., hidden]`."""

    def prompts(self) -> list[LayerState]:
        """The layers as they are at the end of the prompt. Their mass is unknown: later queries have added to it."""
        end = self.document.prompt_tokens

        def cut(state: LayerState) -> LayerState:
            parts = {name: getattr(state, name)[:, :, :end] for name in ("keys", "values", "positions", "queries")}
            return dataclasses.replace(state, **parts, mass=None, capacity=torch.full_like(state.capacity, end))

        return [cut(state) for state in self.layers]


class Samples(Protocol):
    """What a method is calibrated with: gone through, the samples of some texts; and the model, for what has to be trained."""

    @property
    def lm(self) -> LM:
        """The model."""
        ...

    @property
    def documents(self) -> tuple[Document, ...]:
        """The texts."""
        ...

    def __iter__(self) -> Iterator[Sample]:
        """The samples, made anew each time they are gone through."""
        ...

    def advance(self, done: int, total: int) -> None:
        """Tells whoever waits how much is done, for a method that does not go through the samples."""
        ...


@dataclass(frozen=True)
class Calibration:
    """What a method's calibration found for one model."""

    method: str
    knobs: Mapping[str, Any]
    """The knobs it depends on."""
    model: str
    """The model's fingerprint."""
    layers: tuple[int, ...]
    """The layers the rows of a cache method's table stand for, if it has one a layer."""
    about: Mapping[str, Any]
    """The model's name, and the texts."""
    tables: Mapping[str, torch.Tensor] = field(repr=False, compare=False)

    def save(self, path: Path) -> Path:
        """Writes one safetensors file, in place of an earlier one."""
        path.parent.mkdir(parents=True, exist_ok=True)
        facts = {name: getattr(self, name) for name in _FACTS}
        temporary = path.with_suffix(f".{os.getpid()}.tmp")
        tables = {name: table.detach().cpu().contiguous() for name, table in self.tables.items()}
        save_file(tables, temporary, {"format": _FORMAT, "calibration": json.dumps(facts)})
        os.replace(temporary, path)
        return path

    @classmethod
    def load(cls, path: Path) -> Calibration:
        """Reads a file that `save` wrote. Raises UserError if it is none."""
        try:
            with safe_open(path, framework="pt") as file:
                facts = json.loads((file.metadata() or {})["calibration"])
                tables = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
            return cls(**{**facts, "layers": tuple(facts["layers"])}, tables=tables)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is no calibration ({type(error).__name__}); delete it, and calibrate again.") from None


_FACTS = ("method", "knobs", "model", "layers", "about")


class Calibrated(Protocol):
    """A method that needs a calibration, as the engine knows it."""

    name: str
    needs_calibration: bool
    calibration: Calibration | None

    def calibration_knobs(self) -> dict[str, Any]:
        """The knobs its calibration depends on, and their values."""
        ...

    def with_calibration(self, calibration: Calibration) -> Calibrated:
        """A copy that knows its calibration."""
        ...


def calibration_file(model: str, method: Calibrated) -> Path:
    """Where the user's cache directory keeps the calibration of a method for the model of this fingerprint."""
    return cache_directory() / _FOLDER / model / _file_name(method)


def shipped_file(builtin: str, method: Calibrated) -> Path:
    """Where the package keeps the calibration of a method for a built-in model."""
    return BUILTIN / builtin / _FOLDER / _file_name(method)


def find(model: str, method: Calibrated) -> Calibration | None:
    """The calibration of a method for the model of this fingerprint: the user's own, or one that came with the package.

    Raises UserError if a file cannot be read, or is another model's.
    """
    own = calibration_file(model, method)
    if own.exists():
        found = Calibration.load(own)
        check(found, model, method, f"in {own}")
        return found
    shipped = [path for path in BUILTIN.glob(f"*/{_FOLDER}/*.safetensors") if path.name == _file_name(method)]
    return next((found for found in map(Calibration.load, shipped) if found.model == model), None)


def ready(method: Any, lm: LM) -> Any:
    """The method itself, or where it needs a calibration a copy that knows it. Raises UserError if there is none.

    A method that says what models it serves is asked first: for others it cannot be calibrated.
    """
    if not getattr(method, "needs_calibration", False):
        return method
    if hasattr(method, "check"):
        method.check(lm.anatomy)
    return ready_for(method, fingerprint(lm), lm.name)


def ready_for(method: Any, model: str | None, name: str) -> Any:
    """As `ready`, for the model of this fingerprint and name."""
    if not getattr(method, "needs_calibration", False):
        return method
    if model is None:
        raise UserError(
            f"{method.name!r} needs its calibration for {name}, and which model this is cannot be told, since some weights are "
            "not in memory or the recording is an old one; load the model whole and record anew."
        )
    if method.calibration is not None:
        check(method.calibration, model, method, "that was given")
        return method
    found = find(model, method)
    if found is None:
        raise UserError(
            f"{method.name!r} is not calibrated for {name}; run `workbench calibrate --model {name} --method {_text(method)}` "
            "once, or wb.calibrate(lm, method) in a notebook."
        )
    return method.with_calibration(found)


def check(calibration: Calibration, model: str, method: Calibrated, which: str) -> None:
    """Raises UserError if a calibration is not this method's, with these knobs, for this model."""
    if calibration.method != method.name or dict(calibration.knobs) != method.calibration_knobs():
        raise UserError(
            f"The calibration {which} is of {calibration.method!r} with {dict(calibration.knobs)}, not of {method.name!r} with "
            f"{method.calibration_knobs()}; calibrate it again."
        )
    if calibration.model != model:
        raise UserError(
            f"The calibration of {method.name!r} {which} is of another model ({calibration.about.get('model')}, "
            f"{calibration.model}, and this one is {model}); calibrate it again."
        )


def _file_name(method: Calibrated) -> str:
    return f"{'-'.join([method.name, *(f'{name}={value}' for name, value in method.calibration_knobs().items())])}.safetensors"


def _text(method: Calibrated) -> str:
    """The method with its calibration's knobs, as the command line takes it."""
    knobs = ",".join(f"{name}={value}" for name, value in method.calibration_knobs().items())
    return f"{method.name}:{knobs}" if knobs else method.name
