"""Finished parts of a comparison on disk: one setup on one workload each, so that a killed run goes on where it was."""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import shutil
import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import CodeType
from typing import Any

import torch

from workbench.engine.setup import Method, Setup
from workbench.errors import UserError
from workbench.models.load import LM
from workbench.probes.environment import environment
from workbench.trace.comparison import Row
from workbench.trace.trace import Trace
from workbench.workloads.base import Episode

_FORMAT = 1
_FOLDER = "cells"


@dataclass(frozen=True)
class Cell:
    """One setup on one workload."""

    row: Row
    trace: Trace
    """Of the first episode."""
    forced: list[tuple[tuple[int, ...], ...]]
    """The tokens each episode was led along, turn by turn."""


class Cells:
    """The finished cells of one model and workload in a folder that others may share.

    A cell is a trace and, written after it and whole, a JSON file that holds the whole key in plain words: what a result
    depends on is compared, not only its digest.
    """

    def __init__(self, out: Path, key: dict[str, Any], fresh: bool):
        self._directory = out / _FOLDER
        self._key = key
        self._fresh = fresh
        try:
            self._directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"Cannot write to {out} ({error.strerror}); choose another folder.") from None

    def read(self, setup: Setup, forced: Sequence[tuple]) -> Cell | None:
        """A finished cell, or None if there is none that fits. `forced` is what other setups must have been led along."""
        path = self._path(setup)
        if self._fresh or not path.exists():
            return None
        try:
            data = json.loads(path.read_text())
            known = [tuple(map(tuple, episode)) for episode in data["forced"]]
            if data["key"] != self._whole_key(setup) or (any(forced) and known != list(forced)):
                return None
            return Cell(Row.from_dict(data["row"]), Trace.load(path.with_suffix(".trace")), known)
        except (ValueError, KeyError, TypeError, UserError):
            return None

    def write(self, setup: Setup, cell: Cell) -> None:
        """Keeps a finished cell. Raises UserError if it cannot be written."""
        path = self._path(setup)
        temporary, trace = path.with_suffix(".tmp"), path.with_suffix(".trace")
        try:
            path.unlink(missing_ok=True)
            shutil.rmtree(trace, ignore_errors=True)  # of a run that was killed while it wrote
            cell.trace.save(trace)
            data = {"key": self._whole_key(setup), "row": asdict(cell.row), "forced": cell.forced}
            temporary.write_text(json.dumps(data, indent=1))
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"Cannot write {path} ({error.strerror}); make room, or choose another folder.") from None

    def _whole_key(self, setup: Setup) -> dict[str, Any]:
        return {**self._key, "setup": setup.label, "methods": [method_fingerprint(each) for each in setup.methods.values()]}

    def _path(self, setup: Setup) -> Path:
        digest = hashlib.sha256(json.dumps(self._whole_key(setup), sort_keys=True).encode()).hexdigest()[:16]
        name = "".join(c if c.isalnum() or c in "-_." else "-" for c in setup.label).strip("-")
        return self._directory / f"{name[:80]}-{digest}.json"


def cell_key(lm: LM, workload: str, settings: dict[str, Any], episodes: list[Episode]) -> dict[str, Any]:
    """All that a cell's result depends on but its setup, JSON-ready: weights, episodes as token ids, versions, machine."""
    key = {
        "format": _FORMAT,
        "model": model_fingerprint(lm),
        "device": str(lm.device),
        "workload": workload,
        "settings": settings,
        "episodes": hashlib.sha256(repr(episodes).encode()).hexdigest(),
        "environment": environment(),
    }
    return json.loads(json.dumps(key))


def model_fingerprint(lm: LM) -> str:
    """CRC-32 of every weight and buffer and of the config: another model, or one changed weight, has another."""
    config = {name: value for name, value in lm.model.config.to_dict().items() if name != "_name_or_path"}
    crc = zlib.crc32(json.dumps(config, sort_keys=True, default=str).encode())
    for name, tensor in lm.model.state_dict().items():
        crc = zlib.crc32(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(), crc)
        flat = tensor.detach().cpu().contiguous().flatten()
        crc = zlib.crc32(flat.view(torch.uint8).numpy(), crc)
    return f"{crc:08x}"


def method_fingerprint(method: Method) -> str:
    """CRC-32 of a method's own code and of what it was calibrated to: a class written anew in a notebook has another."""
    crc = 0
    for name, member in sorted(vars(type(method)).items()):
        function = inspect.unwrap(getattr(member, "fget", None) or getattr(member, "__func__", member))
        if inspect.isfunction(function) and function.__module__ == type(method).__module__:
            crc = zlib.crc32(f"{name} {_code(function.__code__)}".encode(), crc)
    calibration = getattr(method, "calibration", None)
    for name, tensor in sorted(calibration.tables.items()) if calibration is not None else ():
        crc = zlib.crc32(f"{name} {tensor.tolist()}".encode(), crc)
    return f"{crc:08x}"


def _code(code: CodeType) -> str:
    """What a function does, whichever line it stands on."""
    return repr((code.co_code.hex(), code.co_names, code.co_varnames, list(map(_constant, code.co_consts))))


def _constant(value: Any) -> str:
    if isinstance(value, frozenset):  # its order is another in every process
        return repr(sorted(map(repr, value)))
    return _code(value) if isinstance(value, CodeType) else repr(value)
