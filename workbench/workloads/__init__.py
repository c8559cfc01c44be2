"""Workloads: what is run, and how an answer is scored. One a file, registered; `workloads.recall(context=512)`."""

from workbench.registry import import_folder
from workbench.workloads.base import WORKLOADS, Answer, Episode, Turn, Workload, parse_workload

import_folder(__name__, __path__)

__all__ = ["WORKLOADS", "Answer", "Episode", "Turn", "Workload", "parse_workload"]


def __getattr__(name: str) -> type[Workload]:
    if name.startswith("_") or name not in WORKLOADS:
        raise AttributeError(f"module {__name__!r} has no workload {name!r}; there are {', '.join(WORKLOADS)}")
    return WORKLOADS[name]
