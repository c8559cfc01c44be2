"""`wb.load(name)`: a model, its tokenizer and its anatomy, from wherever the name points."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from workbench.errors import UserError
from workbench.models import gemma
from workbench.models.anatomy import Anatomy, anatomy_of
from workbench.models.blueprint import blueprint
from workbench.trace.display import RichDisplay

_HUB_TIMEOUT_S = 10

BUILTIN = Path(__file__).parent / "builtin"


@dataclass(frozen=True)
class LM(RichDisplay):
    """A causal language model ready to run."""

    name: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase

    @cached_property
    def anatomy(self) -> Anatomy:
        """What the model is made of."""
        return anatomy_of(self.model)

    @property
    def device(self) -> torch.device:
        """The device of the model's first weight."""
        return self.model.device

    @property
    def end_tokens(self) -> frozenset[int]:
        """Token ids that end a text."""
        ends = self.model.generation_config.eos_token_id
        return frozenset(ends if isinstance(ends, list) else [] if ends is None else [ends])

    @property
    def pad_token(self) -> int:
        """The id that fills up short rows of a batch; any will do, as padding is never attended to."""
        pad = self.tokenizer.pad_token_id
        return pad if pad is not None else 0

    @cached_property
    def token_text(self) -> Callable[[int], str]:
        """The text of one token id, decoded once."""
        return functools.cache(lambda token: self.tokenizer.decode([token]))

    def encode(self, text: str | list[str]) -> dict[str, torch.Tensor]:
        """Tensors for the model's forward or generate, batches padded on the left."""
        if self.tokenizer.pad_token_id is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        encoded = self.tokenizer(text, return_tensors="pt", padding=not isinstance(text, str), padding_side="left")
        return {name: encoded[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def __repr__(self) -> str:
        anatomy = self.anatomy
        size = f"{anatomy.num_parameters / 1e6:.1f}M parameters"
        return f"LM({self.name}: {anatomy.class_name}, {size}, {anatomy.dtype}, {self.device})"

    def _repr_html_(self) -> str:
        anatomy = self.anatomy
        limit = "" if anatomy.max_positions is None else f", context of {anatomy.max_positions:,} tokens"
        facts = f"{anatomy.num_layers} layers, {anatomy.kv_bytes_per_token:,} bytes of KV a token{limit}"
        return f"{super()._repr_html_()}<p>{facts}</p>"


def builtin_names() -> list[str]:
    """The models that come with the package."""
    return sorted(path.parent.name for path in BUILTIN.glob("*/config.json"))


def load(
    source: str | Path | tuple[PreTrainedModel, PreTrainedTokenizerBase],
    *,
    dtype: torch.dtype | str = "auto",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
) -> LM:
    """Loads a model for inference.

    Args:
        source: `tiny-dense` or `tiny-moe` (built in), `gemma-3-270m` (extra `gemma`), a directory, a hub id, or a
            `(model, tokenizer)` pair, which is used as it is.
        dtype: element type of the weights; `auto` takes the one they are stored in.
        device: where to; None is the first CUDA GPU, or the CPU.
        trust_remote_code: whether a hub model may bring its own code.

    Raises:
        UserError: if there is no such model, or it is no causal LM.
    """
    if isinstance(source, tuple):
        model, tokenizer = source
        return LM(type(model).__name__, model.eval(), tokenizer)
    name = str(source)
    place = _place(name)
    if Path(place).is_dir() and not (Path(place) / "config.json").is_file():
        raise UserError(
            f"The directory {name} holds no config.json, so it is no saved model; give one that save_pretrained wrote."
        )
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    try:
        with _no_loading_bar():
            options["local_files_only"] = _is_here(place)
            ours = name == gemma.NAME
            tokenizer = gemma.tokenizer(Path(place)) if ours else AutoTokenizer.from_pretrained(place, **options)
            model = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, **options)
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise UserError(_why_not(name, error)) from None
    try:
        model = model.to(device).eval()
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"Cannot put {name} on device {str(device)!r}: {str(error).splitlines()[0]}.") from None
    return LM(name, model, tokenizer)


def anatomy(source: str | Path | PreTrainedConfig) -> Anatomy:
    """What a model is made of, from its config alone: no weight is read or allocated, so it may be of any size.

    Args:
        source: whatever `load` takes a name for, a directory that holds only a config.json, such a file, or a config.

    Raises:
        UserError: if there is no such config, or it describes no causal LM.
    """
    name = type(source).__name__ if isinstance(source, PreTrainedConfig) else str(source)
    config = source if isinstance(source, PreTrainedConfig) else _read_config(name)
    try:
        return anatomy_of(blueprint(config))
    except Exception as error:  # a config may hold anything, and model code fails on it in any way
        raise UserError(f"{name} describes no causal language model: {_one_line(error)}") from None


def _read_config(name: str) -> PreTrainedConfig:
    place = Path(_place(name))
    if place.is_dir() and not (place / "config.json").is_file():
        raise UserError(f"The directory {name} holds no config.json; give one that does, or the file itself.")
    try:
        return AutoConfig.from_pretrained(str(place), local_files_only=_is_here(place))
    except Exception as error:  # checked by the config classes themselves, each in its way
        if place.exists():
            raise UserError(f"{name} is no model config: {_one_line(error)}") from None
        raise UserError(_why_not(name, error)) from None


def _place(name: str) -> str | Path:
    """Where `from_pretrained` finds a name."""
    if name in builtin_names():
        return BUILTIN / name
    if name == gemma.NAME:
        return gemma.directory()
    if not name.strip():
        raise UserError(f"A model needs a name; built in are {', '.join(builtin_names())}.")
    try:
        Path(name).exists()
    except OSError as error:
        raise UserError(f"{name[:60]!r}… cannot be the name of a model ({error.strerror}).") from None
    return name


def _is_here(place: str | Path) -> bool:
    """Whether a model can be loaded without the hub. Asks the hub, once and briefly, only if it cannot.

    Loading would ask the hub again and again before it gave up; this raises ValueError at once.
    """
    if Path(place).exists() or try_to_load_from_cache(str(place), "config.json"):
        return True
    try:
        HfApi().model_info(str(place), timeout=_HUB_TIMEOUT_S)
    except Exception as error:  # which errors these are depends on the HTTP library the hub client was built on
        raise ValueError(str(error)) from error
    return False


def _why_not(name: str, error: Exception) -> str:
    if Path(name).is_file():
        return f"{name} is a file; give the directory that holds config.json and the weights."
    if Path(name).is_dir():
        return f"The directory {name} does not load as a causal language model: {_first_line(error)}"
    return (
        f"There is no model {name!r}: it is no directory here, and the hub did not have it or could not be reached. "
        f"Built in: {', '.join(builtin_names())}; with the extra `gemma`: {gemma.NAME}."
    )


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0].rstrip(".") + "."


def _one_line(error: Exception) -> str:
    """An error's first line, and the second where the first only announces it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return " ".join(lines[: 2 if lines[0].endswith(":") else 1]).rstrip(".") + "."


@contextmanager
def _no_loading_bar() -> Iterator[None]:
    """Silences transformers' bar for loading weights, which is over before it could be read."""
    was_on = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            transformers_logging.enable_progress_bar()
