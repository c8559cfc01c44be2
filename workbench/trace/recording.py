"""A recording: the trace of a dense run with the queries, keys and values of its layers, on which policies are replayed."""

from __future__ import annotations

import json
import os
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from workbench.errors import UserError
from workbench.trace.display import RichDisplay
from workbench.trace.trace import Trace

_FILE = "recording.safetensors"
_FORMAT = 3
_FACTS = ("layer", "scaling", "softcap", "frequencies", "interleaved")
"""What the header says of each layer."""


@dataclass(frozen=True)
class LayerTensors:
    """One layer of a run over P prompt and S decoded tokens, N = P + S in all, as its attention saw them.

    Shapes: Hq query heads, H kv heads, D head size, Dv value size.
    """

    layer: int
    queries: torch.Tensor = field(repr=False)
    """`[Hq, N, D]`, rotated."""
    keys: torch.Tensor = field(repr=False)
    """`[H, N, D]`, rotated."""
    values: torch.Tensor = field(repr=False)
    """`[H, N, Dv]`."""
    prompt_mass: torch.Tensor = field(repr=False)
    """`[H, P]` float32: attention each prompt token received from the prompt, summed over the query heads of a group."""
    scaling: float
    softcap: float | None = None
    sinks: torch.Tensor | None = field(default=None, repr=False)
    """`[Hq]` learned logits that take part in the softmax (GPT-OSS)."""
    frequencies: tuple[float, ...] | None = field(default=None, repr=False)
    """Radians a position of each plane of a head that q and k were rotated in (RoPE), none if not at all; None: unknown."""
    interleaved: bool = False
    """Whether a plane holds neighbours, (0, 1), (2, 3) …, instead of (0, P), (1, P + 1) …"""
    foresight: torch.Tensor | None = field(default=None, repr=False)
    """`[R, Hq, P]` float32: attention each prompt token received from the tokens of each rehearsal, summed over these."""

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by name."""
        named = {name: getattr(self, name) for name in ("queries", "keys", "values", "prompt_mass", "sinks", "foresight")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}


@dataclass(frozen=True)
class Recording(RichDisplay):
    """A dense run: its trace, and q, k, v of chosen layers. Made by `wb.record`."""

    trace: Trace
    layers: tuple[LayerTensors, ...]
    prompt_tokens: int
    rehearsals: tuple[dict[str, Any], ...] = ()
    """What was rehearsed after the prompt, so that methods that foresee can be replayed: see `rehearse` of `wb.record`."""
    derived: dict[int, Any] = field(default_factory=dict, init=False, repr=False, compare=False)
    """What a replay worked out of a layer's tensors, by layer, kept for the next replay. Never saved."""

    @property
    def steps(self) -> int:
        """Decoded tokens: queries that came after the prompt."""
        return self.tokens - self.prompt_tokens

    @property
    def prompt(self) -> list[int]:
        """Token ids of the prompt."""
        return self.trace.table("tokens").sort_values("position")["id"].tolist()[: self.prompt_tokens]

    @property
    def tokens(self) -> int:
        """Tokens recorded, prompt and decoded."""
        return self.layers[0].keys.shape[1]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.nbytes for layer in self.layers for tensor in layer.tensors().values())

    def save(self, path: str | Path) -> Path:
        """Writes a trace directory with `recording.safetensors` in it and returns its path. `Trace.load` opens it, too."""
        directory = self.trace.save(path)
        tensors = {
            f"{layer.layer}.{name}": tensor.contiguous() for layer in self.layers for name, tensor in layer.tensors().items()
        }
        about = {
            "format": _FORMAT,
            "prompt_tokens": self.prompt_tokens,
            "rehearsals": list(self.rehearsals),
            "layers": [{name: getattr(layer, name) for name in _FACTS} for layer in self.layers],
        }
        temporary = directory / f"{_FILE}.tmp"
        try:
            header = json.dumps(about)
            save_file(tensors, temporary, metadata={"recording": header, "crc32": _checksum(header, self.trace, tensors)})
            os.replace(temporary, directory / _FILE)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise UserError(f"Cannot write {directory / _FILE} ({error}); choose another folder.") from None
        return directory

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Opens a directory `save` wrote, its tensors in main memory. Raises UserError if it is none, damaged or cut short."""
        directory = Path(path)
        trace = Trace.load(directory)
        file = directory / _FILE
        if not file.is_file():
            raise UserError(
                f"{directory} is a trace without tensors; make a recording with wb.record(lm, prompt).save(folder)."
            )
        try:
            with safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
                about = json.loads(header["recording"])
                version = about["format"]
                tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
            if version == _FORMAT:
                if _checksum(header["recording"], trace, tensors) != header["crc32"]:
                    raise ValueError("what was read is not what was written")
                layers = tuple(_layer(entry, tensors) for entry in about["layers"])
                return _fitting(cls(trace, layers, about["prompt_tokens"], tuple(about["rehearsals"])))
        except (SafetensorError, OSError, ValueError, KeyError, TypeError, IndexError):
            raise UserError(f"{file} is damaged or cut short; record it again.") from None
        raise UserError(f"{file} has format {version}, and this version reads format {_FORMAT}; record it again.")

    def __repr__(self) -> str:
        shape = f"{self.prompt_tokens} + {self.steps} tokens, {len(self.layers)} layers, {self.nbytes / 2**20:.1f} MiB"
        return f"Recording({self.trace.anatomy.class_name}, {shape})"


def _checksum(header: str, trace: Trace, tensors: dict[str, torch.Tensor]) -> str:
    """CRC-32 of what a replay reads: the header, the recorded token ids and the tensors, in the order of their names."""
    crc = zlib.crc32(trace.table("tokens")["id"].to_numpy().tobytes(), zlib.crc32(header.encode()))
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].cpu().contiguous().flatten().view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return f"{crc:08x}"


def _layer(entry: dict[str, Any], tensors: dict[str, torch.Tensor]) -> LayerTensors:
    prefix, frequencies = f"{entry['layer']}.", entry["frequencies"]
    named = {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
    return LayerTensors(**{**entry, "frequencies": None if frequencies is None else tuple(frequencies)}, **named)


def _fitting(recording: Recording) -> Recording:
    """The recording, if its tensors fit each other. Raises ValueError if not."""
    tokens, prompt = recording.tokens, recording.prompt_tokens
    for layer in recording.layers:
        lengths = {layer.queries.shape[1], layer.keys.shape[1], layer.values.shape[1]}
        if lengths != {tokens} or layer.prompt_mass.shape != (layer.keys.shape[0], prompt):
            raise ValueError(f"layer {layer.layer} does not fit")
        if (0 if layer.foresight is None else len(layer.foresight)) != len(recording.rehearsals):
            raise ValueError(f"rehearsals of layer {layer.layer} are missing")
    return recording
