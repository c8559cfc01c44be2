"""Peak memory of a stretch of code: the CUDA allocator's, or this process's own on Linux."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_RESET_PEAK = "5"


@dataclass
class Peak:
    """The highest memory use seen, or None with the reason why it cannot be had."""

    peak_bytes: int | None = None
    reason: str | None = None


@contextmanager
def peak_memory(device: torch.device) -> Iterator[Peak]:
    """Measures the peak inside the block: allocated tensors on CUDA, the whole process elsewhere."""
    peak = Peak()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        yield peak
        peak.peak_bytes = torch.cuda.max_memory_allocated(device)
        return
    try:
        _CLEAR_REFS.write_text(_RESET_PEAK)
    except OSError:
        peak.reason = "this system does not let a process reset its peak memory"
        yield peak
        return
    yield peak
    for line in _STATUS.read_text().splitlines():
        if line.startswith("VmHWM:"):
            peak.peak_bytes = int(line.split()[1]) * 1024
