"""Samples GPUs while a model runs: energy, power, memory, utilisation and clocks, by a thread of its own.

The thread appends to a list of its own; whoever owns the sampler fetches the rows. It holds no reference to the sampler,
so it ends with it at the latest. Between `pause` and `start` it sleeps.
"""

from __future__ import annotations

import math
import queue
import threading
import time
import weakref
from collections import deque
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from numbers import Real

import torch
from torch import nn

from workbench.errors import UserError
from workbench.probes import nvml
from workbench.trace.schema import TABLES

PERIOD_S = 0.1
SHORTEST_PERIOD_S = 0.001
THREAD = "workbench device sampler"

_COLUMNS = TABLES["device"].names
_ALLOCATOR = ("allocated_bytes", "reserved_bytes")
_PATIENCE_S = 5.0
"""How long to wait for a thread that is to end: a driver that hangs must not hang the run."""


class DeviceSampler:
    """Samples GPUs from `start` to `stop`, leaving out what lies between `pause` and the next `start`.

    Where there is nothing to sample, or no driver to ask, there is one row that says why, and no thread.
    """

    def __init__(self, devices: tuple[torch.device, ...] = (), period_s: float = PERIOD_S, *, reason: str | None = None):
        """Nothing is asked before `start`.

        Args:
            devices: the CUDA devices to sample; none: every GPU that NVML lists.
            period_s: seconds between samples.
            reason: why nothing is to be sampled, if so.
        """
        self._given = (devices, period_s, reason)
        self.devices = devices
        self.period_s = None if reason else min(float(period_s), threading.TIMEOUT_MAX)
        self._reason = reason
        self._said = False
        self._rows: deque[tuple] = deque()
        self._loop: _Loop | None = None
        self._thread: threading.Thread | None = None

    def another(self) -> DeviceSampler:
        """One with the same settings that has not begun."""
        devices, period_s, reason = self._given
        return DeviceSampler(devices, period_s, reason=reason)

    def start(self) -> None:
        """Takes a first sample and begins, or goes on after `pause`. Raises nothing for what the machine lacks."""
        if self._loop is None and self._reason is None:
            self._reason = self._begin()
        if self._loop is not None:
            self._loop.resume()
        elif not self._said:
            self._said = True
            where = self.devices[0] if len(self.devices) == 1 else None
            self._rows.append(_row(time.perf_counter_ns(), where and str(where), {}, str(self._reason)))

    def pause(self) -> None:
        """Lets the thread sleep after its next sample."""
        if self._loop is not None:
            self._loop.busy = False

    def sample(self) -> None:
        """Takes a sample now, if sampling has begun and not ended (in a forked process it has)."""
        if self._loop is not None and self._thread is not None and self._thread.is_alive():
            self._loop.sample()

    def stop(self) -> None:
        """Has the thread take a last sample and waits for its end."""
        if self._loop is not None and self._thread is not None:
            self._loop.end()
            self._thread.join(_PATIENCE_S)
            self._loop = None

    def rows(self) -> list[tuple]:
        """The rows of the `device` table since the last call."""
        taken = []
        while self._rows:
            taken.append(self._rows.popleft())
        return taken

    def _begin(self) -> str | None:
        """Opens NVML and starts the thread, which closes it. Returns why not, if not."""
        try:
            with ExitStack() as opened:
                opened.enter_context(nvml.opened())
                gpus = [nvml.gpu_of(device) for device in self.devices] or nvml.listed_gpus()
                if not gpus:
                    return "NVML lists no GPU"
                loop = _Loop([nvml.Reader(gpu) for gpu in gpus], self.period_s, self._rows)
                loop.sample()
                thread = threading.Thread(target=loop.run, args=(opened.pop_all(),), name=THREAD, daemon=True)
        except nvml.NVMLError as error:
            return f"NVML: {nvml.explain(error)}"
        weakref.finalize(self, loop.end)
        self._loop, self._thread = loop, thread
        thread.start()
        return None


@dataclass
class _Loop:
    """What the thread works on. It is woken through a SimpleQueue, the one channel that a finaliser may safely use."""

    readers: list[nvml.Reader]
    period_s: float
    rows: deque[tuple]
    busy: bool = True
    asleep: bool = False
    ended: bool = False
    wake: queue.SimpleQueue[None] = field(default_factory=queue.SimpleQueue)

    def run(self, opened: ExitStack) -> None:
        with opened:
            while not self.ended:
                self._wait()
                self.sample()
                if not self.busy and not self.ended:
                    self._sleep()

    def _wait(self) -> None:
        # Counted from the end of a sample, so that slow queries make samples rarer instead of piling up.
        with suppress(queue.Empty):
            self.wake.get(timeout=self.period_s)

    def _sleep(self) -> None:
        """Until there is work again; then a sample at once, so that the pause does not blur what follows."""
        self.asleep = True
        while not self.busy and not self.ended:
            self.wake.get()
        self.asleep = False
        if not self.ended:
            self.sample()

    def resume(self) -> None:
        self.busy = True
        if self.asleep:
            self.wake.put(None)

    def end(self) -> None:
        self.ended = True
        self.wake.put(None)

    def sample(self) -> None:
        for reader in self.readers:
            self.rows.append(_sampled(reader))


def _sampled(reader: nvml.Reader) -> tuple:
    gpu = reader.gpu
    t_ns = time.perf_counter_ns()
    if gpu.handle is None:
        return _row(t_ns, gpu.name, {}, str(gpu.reason))
    values, missing = reader.read()
    try:
        values |= _allocator(gpu.cuda_index)
    except (LookupError, RuntimeError) as error:
        missing[_ALLOCATOR] = str(error)
    why = "; ".join(f"{', '.join(columns)}: {reason}" for columns, reason in missing.items())
    return _row(t_ns, gpu.name, values, why or None)


def _allocator(cuda_index: int | None) -> dict[str, int]:
    """Bytes of this process' torch on a device. Raises LookupError where torch does not use it."""
    if cuda_index is None or not torch.cuda.is_initialized():
        raise LookupError("torch does not use this GPU")
    stats = torch.cuda.memory_stats_as_nested_dict(cuda_index)
    return {name: stats[name]["all"]["current"] for name in _ALLOCATOR}


def _row(t_ns: int, device: str | None, values: dict[str, int], reason: str | None) -> tuple:
    known = {"t_ns": t_ns, "device": device, "reason": reason, **values}
    return tuple(known.get(name) for name in _COLUMNS)


def device_sampler(model: nn.Module, period_s: float | None) -> DeviceSampler:
    """The sampler for a model's run.

    Args:
        model: its CUDA devices are sampled; if it has none, every GPU, provided a period is given.
        period_s: seconds between samples, `math.inf` for none; None is 0.1 on CUDA and none elsewhere.

    Raises:
        UserError: for what is no period.
    """
    if period_s is not None and not (_is_number(period_s) and period_s >= SHORTEST_PERIOD_S):
        raise UserError(
            f"device_period_s={period_s!r} is no sampling period; give {SHORTEST_PERIOD_S} seconds or more, "
            "or math.inf not to sample."
        )
    places = dict.fromkeys(tensor.device for tensor in (*model.parameters(), *model.buffers()))
    cuda = tuple(place for place in places if place.type == "cuda")
    if period_s == math.inf:
        return DeviceSampler(cuda, reason="sampling was switched off by device_period_s=math.inf")
    if period_s is None and not cuda:
        where = ", ".join(map(str, places)) or "no device"
        return DeviceSampler(reason=f"the model lies on {where}; with device_period_s every GPU is sampled all the same")
    return DeviceSampler(cuda, PERIOD_S if period_s is None else period_s)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)
