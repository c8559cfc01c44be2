"""Whether a decoder layer computes what its anatomy says, tried while it runs.

The first layer of each kind runs under a FLOP counter at the first forward call, and at the first with a past: from
then on, a kind that adds up costs nothing. A kind that does not (a state-space mixer beside the attention, an indexer)
stays under the counter in all its layers, and what the anatomy does not place is reported as `unattributed`. Experts
are left out of the comparison, since they are measured by their routing, and attention counts by its shapes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from workbench.cost.flops import attention_flops, linear_flops
from workbench.models.anatomy import decoder_layers, expert_modules
from workbench.probes.counting import NestedCounts
from workbench.probes.step import Step
from workbench.trace.anatomy import Anatomy

_PLAIN = {torch.float32, torch.float64, torch.float16, torch.bfloat16}

_LESS = (
    "Matrices of some layers did less than their sizes make: they did not run for every token, or by a kernel that torch "
    "does not count; `unattributed` takes it off."
)


class LayerCheck:
    """Compares layers with their anatomy between `attach` and `detach`."""

    def __init__(
        self,
        model: nn.Module,
        anatomy: Anatomy,
        counts: NestedCounts,
        current: Callable[[], Step | None],
        note: Callable[[str], None],
        trust: Callable[[int], None],
    ):
        """Observes nothing before `attach`.

        Args:
            model: the model.
            anatomy: what its layers are taken for.
            counts: where calls are counted.
            current: the forward call in progress on this thread.
            note: is told what could not be checked.
            trust: is told each layer of a kind that adds up, with a past and without.
        """
        self._anatomy = anatomy
        self._blocks = decoder_layers(model)
        self._layers = {block: layer for layer, block in enumerate(self._blocks)}
        self._names = {module: name for name, module in model.named_modules()}
        self._experts = list(expert_modules(model).values())
        self._kinds = [_kind(anatomy, layer, block) for layer, block in enumerate(self._blocks)]
        self._counts, self._current, self._note, self._trust = counts, current, note, trust
        self._adds_up: dict[tuple, bool] = {}
        """By kind of layer and whether there was a past."""
        self._handles: dict[nn.Module, list[RemovableHandle]] = {}

    def attach(self) -> None:
        """Starts to check."""
        for module in self._experts:
            self._watch(module, self._enter_experts, self._leave_experts)
        for kind in dict.fromkeys(self._kinds):
            self._watch(self._blocks[self._kinds.index(kind)], self._enter, self._leave)

    def detach(self) -> None:
        """Removes every hook."""
        for module in list(self._handles):
            self._unwatch(module)

    def _watch(self, module: nn.Module, enter: Callable, leave: Callable) -> None:
        if module not in self._handles:
            self._handles[module] = [
                module.register_forward_pre_hook(enter),
                module.register_forward_hook(leave, always_call=True),
            ]

    def _unwatch(self, module: nn.Module) -> None:
        for handle in self._handles.pop(module, ()):
            handle.remove()

    def _enter(self, block: nn.Module, args: tuple) -> None:
        step = self._current()
        if step is not None and not self._adds_up.get((self._kinds[self._layers[block]], step.past > 0)):
            self._counts.enter(block)

    def _leave(self, block: nn.Module, args: tuple, output: Any) -> None:
        counted = self._counts.leave(block)
        step = self._current()
        if counted is None or output is None or step is None:
            return
        layer = self._layers[block]
        beyond = self._beyond_anatomy(step, layer, counted)
        if beyond:
            step.unattributed.append((self._names[block], beyond))
        if beyond < 0:
            self._note(_LESS)
        self._conclude(self._kinds[layer], step.past > 0, beyond == 0 and layer not in step.unknown_attention)

    def _beyond_anatomy(self, step: Step, layer: int, counted: int) -> int:
        """FLOPs of a layer's call that its anatomy does not place; negative where some of its matrices did not run."""
        facts = self._anatomy.layers[layer]
        this_call = (layer, step.ran[layer])
        call = step.attention.get(this_call)
        batch, q_len, kv_read = (step.batch, step.q_len, step.slots_read(layer)) if call is None else call[:3]
        placed = sum(linear_flops(batch * (kv_read if each.per_key else q_len), each) for each in facts.linears)
        beyond = counted - placed
        all_pairs = attention_flops(batch * q_len * kv_read, facts.attention)
        if call is not None:
            beyond += max(0, step.counted_attention[this_call] - all_pairs)
        elif beyond == all_pairs:
            return 0
        else:
            step.unknown_attention.add(layer)
        if beyond < 0 and not _counts_all(self._blocks[layer]):
            self._note("Matrices of a kind that torch's counter does not know are counted by their sizes, unchecked.")
            return 0
        return beyond

    def _conclude(self, kind: tuple, has_past: bool, adds_up: bool) -> None:
        if (kind, has_past) not in self._adds_up or not adds_up:
            self._adds_up[kind, has_past] = adds_up
        alike = [block for block, other in zip(self._blocks, self._kinds, strict=True) if other == kind]
        if not adds_up:
            for block in alike:
                self._watch(block, self._enter, self._leave)
        elif self._adds_up.get((kind, True)) and self._adds_up.get((kind, False)):
            for block in alike:
                self._unwatch(block)
                self._trust(self._layers[block])
            if all(block not in self._handles for block in self._blocks):
                self.detach()

    def _enter_experts(self, module: nn.Module, args: tuple) -> None:
        if self._counts.active:
            self._counts.enter(module)

    def _leave_experts(self, module: nn.Module, args: tuple, output: Any) -> None:
        self._counts.leave(module)


def _kind(anatomy: Anatomy, layer: int, block: nn.Module) -> tuple:
    """What layers of one make have in common: their sizes and the classes of their parts."""
    return replace(anatomy.layers[layer], index=0), tuple(type(part) for part in block.modules())


def _counts_all(block: nn.Module) -> bool:
    """Whether torch multiplies every matrix of the block itself, with no quantised kernel it could not count."""
    return all(parameter.dtype in _PLAIN for parameter in block.parameters() if parameter.ndim > 1)
