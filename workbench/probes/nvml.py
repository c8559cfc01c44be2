"""The only code that talks to NVML, the library of NVIDIA's driver: which GPUs there are and what each of them answers.

NVML counts its initialisations, so every `opened` block pairs its own, and may be called from several threads at once.
Source: NVML API reference, https://docs.nvidia.com/deploy/nvml-api/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import pynvml
import torch

NVMLError = pynvml.NVMLError

QUERIES: dict[tuple[str, ...], Callable[[Gpu], tuple[int, ...]]] = {
    ("energy_mj",): lambda gpu: (energy_mj(gpu),),
    ("power_mw",): lambda gpu: (pynvml.nvmlDeviceGetPowerUsage(gpu.handle),),
    ("used_bytes",): lambda gpu: (int(pynvml.nvmlDeviceGetMemoryInfo(gpu.handle).used),),
    ("util_percent", "memory_util_percent"): lambda gpu: _utilisation(gpu),
    ("clock_mhz",): lambda gpu: (pynvml.nvmlDeviceGetClockInfo(gpu.handle, pynvml.NVML_CLOCK_SM),),
    ("memory_clock_mhz",): lambda gpu: (pynvml.nvmlDeviceGetClockInfo(gpu.handle, pynvml.NVML_CLOCK_MEM),),
}
"""Columns of the `device` table and the call that answers them. Energy comes first: it is what the time is taken for."""

_LASTING = {
    pynvml.NVML_ERROR_NOT_SUPPORTED,
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND,
    pynvml.NVML_ERROR_NO_PERMISSION,
    pynvml.NVML_ERROR_INVALID_ARGUMENT,
    pynvml.NVML_ERROR_ARGUMENT_VERSION_MISMATCH,
}
"""Answers that will not change while a process runs."""

_ADVICE = {
    pynvml.NVML_ERROR_LIBRARY_NOT_FOUND: "as no NVIDIA driver is installed",
    pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH: "so reboot or reload the driver",
    pynvml.NVML_ERROR_FUNCTION_NOT_FOUND: "as the driver is too old",
}


@dataclass(frozen=True)
class Gpu:
    """A GPU: named `cuda:I` where torch numbers it so, else `nvml:I` by nvidia-smi's number.

    `handle` is None where NVML does not open it, and `reason` says why.
    """

    name: str
    cuda_index: int | None
    handle: Any
    reason: str | None = None


@contextmanager
def opened() -> Iterator[None]:
    """Initialises NVML for the block. Raises NVMLError where there is no library or no driver that fits it."""
    pynvml.nvmlInit()
    try:
        yield
    finally:
        with suppress(NVMLError):
            pynvml.nvmlShutdown()


def explain(error: Exception) -> str:
    """An error of NVML in words, with what to do where that is known."""
    advice = _ADVICE.get(getattr(error, "value", None))
    text = str(error).rstrip(".")
    return f"{text}, {advice}" if advice else text


def energy_mj(gpu: Gpu) -> int:
    """A GPU's energy counter: millijoules since the driver was loaded. Raises NVMLError where there is none (before Volta)."""
    return pynvml.nvmlDeviceGetTotalEnergyConsumption(gpu.handle)


def gpu_of(device: torch.device) -> Gpu:
    """The GPU of a CUDA device. Found by UUID, since CUDA_VISIBLE_DEVICES renumbers devices for torch but not for NVML."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    name, uuid = f"cuda:{index}", _cuda_uuid(index)
    try:
        return Gpu(name, index, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}"))
    except NVMLError as error:
        reason = f"NVML does not open {name}: {explain(error)}"
    try:  # a slice of a GPU (MIG) is listed under a prefix of its own
        return Gpu(name, index, pynvml.nvmlDeviceGetHandleByUUID(f"MIG-{uuid}"))
    except NVMLError:
        return Gpu(name, index, None, reason)


def listed_gpus() -> list[Gpu]:
    """Every GPU NVML lists. CUDA is not initialised for it, so torch's numbers are known only where torch has begun."""
    begun = torch.cuda.is_initialized()
    cuda_index = {f"GPU-{_cuda_uuid(index)}": index for index in range(torch.cuda.device_count())} if begun else {}
    return [_listed_gpu(number, cuda_index) for number in range(pynvml.nvmlDeviceGetCount())]


def _listed_gpu(number: int, cuda_index: dict[str, int]) -> Gpu:
    index, name = None, f"nvml:{number}"
    try:
        handle = pynvml.nvmlDeviceGetHandleByIndex(number)
    except NVMLError as error:
        return Gpu(name, None, None, f"NVML does not open {name}: {explain(error)}")
    with suppress(NVMLError):
        index = cuda_index.get(pynvml.nvmlDeviceGetUUID(handle))
    return Gpu(name if index is None else f"cuda:{index}", index, handle)


def _cuda_uuid(index: int) -> str:
    """A CUDA device's UUID without NVML's prefix."""
    return str(torch.cuda.get_device_properties(index).uuid)


def _utilisation(gpu: Gpu) -> tuple[int, int]:
    rates = pynvml.nvmlDeviceGetUtilizationRates(gpu.handle)
    return rates.gpu, rates.memory


@dataclass
class Reader:
    """Reads a GPU's values. What it does not support is asked once."""

    gpu: Gpu
    _refused: dict[tuple[str, ...], str] = field(default_factory=dict)

    def read(self) -> tuple[dict[str, int], dict[tuple[str, ...], str]]:
        """Values by column, and by the columns that are missing, why."""
        values: dict[str, int] = {}
        missing = dict(self._refused)
        for columns, query in QUERIES.items():
            if columns in self._refused:
                continue
            try:
                values |= zip(columns, query(self.gpu), strict=True)
            except NVMLError as error:
                missing[columns] = explain(error)
                if getattr(error, "value", None) in _LASTING:
                    self._refused[columns] = missing[columns]
        return values, missing


def describe() -> str:
    """The driver, and of each GPU what can be read and what not. Raises NVMLError where NVML cannot be used at all."""
    with opened():
        gpus = listed_gpus()
        return ". ".join([f"driver {pynvml.nvmlSystemGetDriverVersion()}, GPUs: {len(gpus)}", *map(_readable, gpus)])


def _readable(gpu: Gpu) -> str:
    if gpu.handle is None:
        return str(gpu.reason)
    product = ""
    with suppress(NVMLError):
        product = f" ({pynvml.nvmlDeviceGetName(gpu.handle)})"
    values, missing = Reader(gpu).read()
    lacking = "".join(f"; not {', '.join(columns)}: {why}" for columns, why in missing.items())
    return f"{gpu.name}{product} reads {', '.join(values) or 'nothing'}{lacking}"
