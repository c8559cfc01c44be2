"""FLOPs of what runs on this thread, by torch's own formulas, counted while it runs.

`FlopCounterMode` counts the same. It also follows the modules, by hooks on every module of the process, which models in
other threads would meet; here nobody asks for that.
"""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from workbench.probes.unobserved import is_unobserved

_aten = torch.ops.aten
FORMULAS = {
    _aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[_aten._scaled_dot_product_flash_attention],
    **flop_registry,
}
"""torch's formulas, and the one it lacks."""


class FlopCount(TorchDispatchMode):
    """FLOPs of the operations inside the block. `inner_flops` of them lie in blocks that were counted on their own."""

    supports_higher_order_operators = True

    def __init__(self, owner: Any = None):
        super().__init__()
        self.owner = owner
        self.flops = self.inner_flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if not isinstance(func, torch._ops.OpOverload):
            return NotImplemented
        formula = FORMULAS.get(func.overloadpacket)
        if formula is None and func is not torch.ops.prim.device.default:
            with self:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        result = func(*args, **kwargs)
        if formula is not None and not is_unobserved():
            self.flops += formula(*args, **kwargs, out_val=result)
        return result


class NestedCounts(threading.local):
    """Counts of calls that may lie inside each other, for each thread its own."""

    def __init__(self):
        self._open: list[FlopCount] = []

    @property
    def active(self) -> bool:
        """Whether a call is being counted on this thread."""
        return bool(self._open)

    def enter(self, owner: Any) -> None:
        """Starts to count a call of `owner`."""
        count = FlopCount(owner)
        self._open.append(count)
        count.__enter__()

    def leave(self, owner: Any) -> int | None:
        """Ends the call, and those inside that never came to their end. Returns its FLOPs without those counted inside.

        None where the call was not counted.
        """
        if not self._open or not any(count.owner is owner for count in self._open):
            return None
        while True:
            count = self._open[-1]
            self._end_last()
            if count.owner is owner:
                return count.flops - count.inner_flops

    def clear(self) -> None:
        """Ends every call that is still counted on this thread."""
        while self._open:
            self._end_last()

    def _end_last(self) -> None:
        count = self._open.pop()
        count.__exit__(None, None, None)
        if self._open:
            self._open[-1].inner_flops += count.flops
