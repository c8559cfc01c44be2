"""A comparison in a thread of its own: it waits for its turn on the model, says how far it is, and can be called off."""

from __future__ import annotations

import threading
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field

import workbench as wb
from workbench.errors import UserError
from workbench.live import line_of
from workbench.workloads import Workload
from workbench_dashboard import kept


class _CalledOff(Exception):
    """Raised where a comparison reports progress, which is the only place it can be left."""


@dataclass
class Job:
    """One comparison. What is read here is written by its thread."""

    lm: wb.LM
    workload: Workload
    setups: Sequence[wb.Setup]
    status: str = "waiting"
    done: dict[str, float] = field(default_factory=dict)
    """The share of the episodes each setup has run, in the order they were begun."""
    error: str | None = None
    id: str | None = None
    """Under which the result is kept."""
    taken: bool = False
    called_off: threading.Event = field(default_factory=threading.Event)
    finished: threading.Event = field(default_factory=threading.Event)

    @property
    def busy(self) -> bool:
        """Whether it goes on."""
        return not self.finished.is_set()

    @property
    def progress(self) -> float:
        """The share of all episodes of all setups that was run; dense is one of them."""
        labels = {setup.label for setup in self.setups} | {"dense"}
        return min(1.0, sum(self.done.values()) / len(labels))


class Comparer:
    """What a page holds of its comparisons: one at a time."""

    def __init__(self, name: str):
        """`name` is who compares, as others in the line see it."""
        self.name = name
        self.job: Job | None = None

    def start(self, job: Job) -> None:
        """Begins a comparison, and calls off the one before."""
        self.cancel()
        self.job = job
        threading.Thread(target=self._work, args=(job,), name=f"workbench compare {self.name}", daemon=True).start()

    def cancel(self) -> None:
        """Calls the comparison off after the episode at hand. What setups have finished is kept."""
        if self.job is not None:
            self.job.called_off.set()

    def take_new(self) -> str | None:
        """The id of a result, once, as soon as there is one."""
        if self.job is None or self.job.busy or self.job.taken:
            return None
        self.job.taken = True
        return self.job.id

    def _work(self, job: Job) -> None:
        def advance(label: str, done: int, total: int) -> None:
            job.done[label] = done / total
            if job.called_off.is_set():
                raise _CalledOff

        def waiting(before: int) -> None:
            job.status = f"waiting: {before} before you"

        try:
            with line_of(job.lm.model).turn(self.name, lambda: not job.called_off.is_set(), waiting) as mine:
                if not mine:
                    raise _CalledOff
                job.status = "running"
                found = wb.compare(job.lm, job.workload, job.setups, out=kept.cells_folder(), on_progress=advance)
            job.id = kept.keep(found)
            job.status = "finished"
        except _CalledOff:
            job.status = "called off"
        except UserError as error:
            job.status, job.error = "stopped", str(error)
        except Exception as error:  # somebody's method may raise anything, and the page has to hear of it
            traceback.print_exc()
            job.status, job.error = "stopped", f"{type(error).__name__}: {error}"
        finally:
            job.finished.set()
