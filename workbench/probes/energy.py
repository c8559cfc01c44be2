"""Energy of a stretch of code, read from the GPU's own counter through NVML, or null with the reason."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from workbench.probes import nvml
from workbench.trace.schema import ENERGY_PERIOD_S, ENERGY_PERIODS

SHORTEST_S = ENERGY_PERIODS * ENERGY_PERIOD_S


@dataclass
class Energy:
    """Joules used, or None with the reason."""

    joules: float | None = None
    reason: str | None = None


@contextmanager
def energy(device: torch.device) -> Iterator[Energy]:
    """Measures the energy of the block on an NVIDIA GPU. Never raises for missing hardware."""
    reading = Energy()
    if device.type != "cuda":
        reading.reason = f"no energy counter is read for device {device.type!r}"
        yield reading
        return
    torch.cuda.synchronize(device)
    before, reading.reason = _counter_mj(device)
    started = time.perf_counter()
    yield reading
    torch.cuda.synchronize(device)
    elapsed = time.perf_counter() - started
    if before is None:
        return
    after, reading.reason = _counter_mj(device)
    if after is None:
        return
    if elapsed < SHORTEST_S:
        reading.reason = f"{elapsed:.2f} s is shorter than ten periods of the energy counter ({SHORTEST_S:.0f} s)"
        return
    reading.joules = (after - before) / 1000


def _counter_mj(device: torch.device) -> tuple[int | None, str | None]:
    try:
        with nvml.opened():
            gpu = nvml.gpu_of(device)
            return (None, gpu.reason) if gpu.handle is None else (nvml.energy_mj(gpu), None)
    except nvml.NVMLError as error:
        return None, f"NVML: {nvml.explain(error)}"
