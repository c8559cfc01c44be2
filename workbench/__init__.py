"""Workbench: see what LLM inference costs and what each method does to it.

    import workbench as wb

    lm = wb.load("tiny-dense")
    cmp = wb.compare(lm, wb.workloads.recall(context=512), [wb.StreamingLLM(budget=0.2), wb.H2O(budget=0.2)])

Names are imported when they are first used, so `import workbench` alone is instant and draws in no plotly.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "Calibration": "workbench.engine.calibration",
    "Check": "workbench.trace.check",
    "Comparison": "workbench.trace.comparison",
    "LM": "workbench.models.load",
    "METHODS": "workbench.methods",
    "Method": "workbench.methods",
    "MethodDidNotFire": "workbench.errors",
    "Recording": "workbench.trace.recording",
    "Replay": "workbench.trace.replay",
    "Session": "workbench.engine.session",
    "Setup": "workbench.engine.setup",
    "Trace": "workbench.trace.trace",
    "UserError": "workbench.errors",
    "anatomy": "workbench.models.load",
    "beside_measured": "workbench.cost.beside",
    "calibrate": "workbench.experiments.calibrate",
    "check_replay": "workbench.experiments.check",
    "compare": "workbench.experiments.compare",
    "hardware": "workbench.cost.hardware",
    "knob": "workbench.methods",
    "load": "workbench.models.load",
    "predict": "workbench.cost.roofline",
    "profile": "workbench.probes.profiler",
    "record": "workbench.experiments.record",
    "register": "workbench.methods",
    "replay": "workbench.experiments.replay",
}
"""Where each public name is defined. Method classes are not listed: the registry knows them."""

_PACKAGES = ("plots", "widgets", "workloads")


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(_HOMES[name]), name)
    if name in _PACKAGES:
        return importlib.import_module(f"workbench.{name}")
    if name == "__all__":
        return sorted([*_HOMES, *_PACKAGES, *_method_classes()])
    if name[:1].isupper():
        classes = _method_classes()
        if name in classes:
            return classes[name]
    raise AttributeError(f"module 'workbench' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__getattr__("__all__")]


def _method_classes() -> dict[str, type]:
    """The methods that come with the package, by class name."""
    methods = importlib.import_module("workbench.methods")
    return {cls.__name__: cls for cls in methods.METHODS.values() if cls.__module__.startswith(f"{__name__}.")}


def load_ipython_extension(shell: Any) -> None:
    """What `%load_ext workbench` calls: adds the magic `%%profile`."""
    magics = importlib.import_module("workbench.magics")
    shell.register_magics(magics.ProfileMagics)
