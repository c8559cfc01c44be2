"""FLOPs of modules the anatomy cannot place, counted while they run.

Most models have none. Where a weight matrix sits in a module of an unknown kind, that module's calls, and only those,
run under the counter, and the result is reported as `unattributed` instead of being left out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from workbench.models.anatomy import unplaced_modules
from workbench.probes.counting import NestedCounts


class UnplacedProbe:
    """Counts the FLOPs of every unplaced module between `attach` and `detach`."""

    def __init__(self, model: nn.Module, counts: NestedCounts, on_call: Callable[[str, int], None]):
        """`on_call` is told the module's name and FLOPs after each of its calls."""
        self._names = {module: name for name, module in unplaced_modules(model).items()}
        self._counts = counts
        self._on_call = on_call
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Starts to count."""
        for module in self._names:
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leave, always_call=True))

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _enter(self, module: nn.Module, args: tuple) -> None:
        self._counts.enter(module)

    def _leave(self, module: nn.Module, args: tuple, output: Any) -> None:
        flops = self._counts.leave(module)
        if flops is not None and output is not None:
            self._on_call(self._names[module], flops)
