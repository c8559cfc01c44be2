"""Memory: the peak of a stretch of code (the CUDA allocator's, or this process's own on Linux), and what is free."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

_CLEAR_REFS = Path("/proc/self/clear_refs")
_STATUS = Path("/proc/self/status")
_MEMINFO = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")
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


def free_bytes(device: torch.device) -> int | None:
    """Memory a new tensor may take: free on the GPU, or available to this process, a container's limit included.

    None where the system does not say.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        lines = _MEMINFO.read_text().splitlines()
        available = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        return None
    try:
        limit, used = ((_GROUP / name).read_text().strip() for name in ("memory.max", "memory.current"))
        return available if limit == "max" else min(available, max(0, int(limit) - int(used)))
    except OSError:
        return available
