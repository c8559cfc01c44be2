"""What works on this machine, and why something does not: a list of checks as plain values."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from workbench.folders import cache_directory
from workbench.probes import nvml
from workbench.probes.environment import environment

EXTRAS = {"notebook": "jupyterlab", "dashboard": "streamlit", "gemma": "gguf", "sweep": "ray"}
"""Each extra and a package that shows it is installed."""


def checks() -> list[dict[str, Any]]:
    """Every check as `{name, ok, detail}`. None raises: what fails says why in its detail."""
    return [_checked(name, check) for name, check in _CHECKS.items()] + [_extra(*item) for item in EXTRAS.items()]


def _checked(name: str, check: Callable[[], str]) -> dict[str, Any]:
    try:
        return {"name": name, "ok": True, "detail": check()}
    except Exception as error:
        reason = str(error).strip().splitlines()
        return {"name": name, "ok": False, "detail": reason[0] if reason else type(error).__name__}


def _processor() -> str:
    facts = environment()
    shape = f"{facts['cores']} cores, {facts['threads']} threads"
    return f"{facts['processor']}, {shape}, Python {facts['python']}, torch {facts['torch']}"


def _cuda() -> str:
    if not torch.cuda.is_available():
        built = torch.version.cuda
        raise RuntimeError("no CUDA GPU is visible to torch" if built else "this torch is a CPU build; models run on the CPU")
    return ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))


def _nvml() -> str:
    try:
        return nvml.describe()
    except nvml.NVMLError as error:
        raise RuntimeError(f"NVML: {nvml.explain(error)}; power and energy are reported as null") from None


def _triton() -> str:
    import triton

    if not torch.cuda.is_available():
        return f"triton {triton.__version__}; without a GPU the kernels' torch references run"
    return f"triton {triton.__version__}"


def _builtin_model() -> str:
    from workbench.engine.session import Session
    from workbench.models.load import builtin_names, load

    for name in builtin_names():
        session = Session(load(name))
        session.prefill("Return a string")
        session.generate(2)
    return f"{', '.join(builtin_names())} load and generate"


def _cache_directory() -> str:
    directory = cache_directory()
    directory.mkdir(parents=True, exist_ok=True)
    probe = directory / ".writable"
    probe.touch()
    probe.unlink()
    return f"{directory} is writable"


def _extra(extra: str, package: str) -> dict[str, Any]:
    there = importlib.util.find_spec(package) is not None
    detail = "installed" if there else f"not installed; pip install 'workbench-llm[{extra}]'"
    return {"name": f"extra {extra}", "ok": there, "detail": detail}


_CHECKS: dict[str, Callable[[], str]] = {
    "processor": _processor,
    "CUDA": _cuda,
    "NVML": _nvml,
    "Triton": _triton,
    "built-in models": _builtin_model,
    "cache directory": _cache_directory,
}
