"""FLOPs of modules the anatomy cannot place, counted by torch's dispatch-mode counter while they run.

Most models have none. Where a weight matrix sits in a module of an unknown kind, that module's calls, and only those,
run under the counter, and the result is reported as `unattributed` instead of being left out.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from torch.utils.hooks import RemovableHandle

from workbench.models.anatomy import unplaced_modules


class UnplacedProbe:
    """Counts the FLOPs of every unplaced module between `attach` and `detach`."""

    def __init__(self, model: nn.Module):
        self._modules = unplaced_modules(model)
        self._handles: list[RemovableHandle] = []
        self._counters: list[FlopCounterMode] = []
        self._seen: list[tuple[str, int]] = []

    def attach(self) -> None:
        """Starts to count."""
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_pre_hook(self._enter))
            self._handles.append(module.register_forward_hook(self._leaver(name), always_call=True))

    def detach(self) -> None:
        """Removes every hook, and ends the counting of a call that never came to its end."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        while self._counters:
            self._counters.pop().__exit__(None, None, None)

    def take(self) -> list[tuple[str, int]]:
        """Module name and FLOPs of each call since the last time."""
        seen, self._seen = self._seen, []
        return seen

    def _enter(self, module: nn.Module, args: tuple) -> None:
        counter = FlopCounterMode(display=False)
        counter.__enter__()
        self._counters.append(counter)

    def _leaver(self, name: str):
        def leave(module: nn.Module, args: tuple, output: Any) -> None:
            counter = self._counters.pop()
            counter.__exit__(None, None, None)
            self._seen.append((name, counter.get_total_flops()))

        return leave
