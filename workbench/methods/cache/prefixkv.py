"""PrefixKV: every layer keeps the same share of its importance. Wang et al. 2024, arXiv 2412.03409."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import AT_END, MASS, REPORT, LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import EVERY_STEP, PREFILL_ONLY, CacheMethod, keep_top, recent
from workbench.methods.cache.budgets import prefix_drops


@register
@dataclass(frozen=True)
class PrefixKV(CacheMethod):
    """Keeps in each layer as many tokens as hold the same share of its attention, and that ratio while it decodes."""

    name: ClassVar[str] = "prefixkv"
    paper: ClassVar[str] = "Wang et al. 2024, arXiv 2412.03409"
    needs: ClassVar[frozenset[str]] = frozenset({MASS})
    acts: ClassVar[frozenset[str]] = EVERY_STEP
    observes: ClassVar[frozenset[str]] = PREFILL_ONLY
    deviations: ClassVar[tuple[str, ...]] = (
        "The budget is the share kept; the paper's code is given the share dropped.",
        "Ratios are solved for each prompt at its end; the paper's default reads them from a file made by calibration.",
        "The bisection runs to the end (60 halvings) instead of until it is within 5 tokens of the budget.",
        "What truncation leaves over is dropped from the layers that hold most, so that shares sum to the uniform budgets.",
        "Keys keep the rotation of their true position, and new tokens get theirs; the paper's code counts on from the "
        "length that is left in the first layer.",
        "Attention is averaged over all query heads, and all kv heads keep the same tokens; the paper's model has no groups.",
        "No more than the budget less one are sinks, so that the smallest budgets can be met.",
    )

    budget: Budget = budget_knob(0.2)
    sinks: int = knob(4, low=0, high=1024, unit="tokens", help="First tokens that always stay.")
    tail: int = knob(
        25, low=1, high=4096, unit="tokens", help="While decoding, the token that goes is the one so far before a share's end."
    )

    @property
    def joint(self) -> str:
        """The ratios are solved once the last layer has reported."""
        return AT_END

    def observe(self, state: LayerState) -> dict[str, torch.Tensor]:
        """Attention each token has received from all heads, highest first, `[B, N]`."""
        received = (state.mass * state.occupied).sum(1)
        return {REPORT: received.sort(dim=-1, descending=True).values}

    def observation_cost(self, state: LayerState) -> tuple[int, int]:
        """The mass is read and its sums written; adding it up is counted by itself."""
        return 0, state.mass.nbytes + state.mass[:, 0].nbytes

    def share(
        self, reports: Sequence[torch.Tensor], held: Sequence[Sequence[int]], prompt_tokens: Sequence[int], num_layers: int
    ) -> list[list[int]]:
        """What is left in each layer and row after its drops; the rows do not know of each other."""
        importance = [report.double().cpu().numpy() for report in reports]
        rows = []
        for row, prompt in enumerate(prompt_tokens):
            lengths = [each[row] for each in held]
            capacity = self.capacity(prompt)
            protected = min(self.sinks, capacity - 1) + 1
            target = max(sum(lengths) - capacity * num_layers, 0)
            of_row = [each[row, :length] for each, length in zip(importance, lengths, strict=True)]
            drops = prefix_drops(of_row, protected, target)
            rows.append(_kept(lengths, drops, protected, target))
        return [list(layer) for layer in zip(*rows, strict=True)]

    def grown(self, share: int, divided_at: int, seen: int) -> int:
        """A layer keeps its ratio, so its share grows with the text."""
        return share * seen // divided_at

    def keep(self, state: LayerState) -> torch.Tensor:
        """At the end of the prompt, the sinks, the newest and the most attended; later all but what passes a fixed slot."""
        if not state.dividing:
            return ~self._passing(state)
        sinks = (state.capacity - 1).clamp(max=self.sinks).view(-1, 1, 1)
        stays = (state.positions < sinks) | recent(state, torch.ones_like(state.capacity))
        scores = (state.mass * state.occupied).sum(1, keepdim=True).expand(state.positions.shape)
        return keep_top(scores.masked_fill(stays, torch.inf), state.capacity, state.occupied)

    def _passing(self, state: LayerState) -> torch.Tensor:
        """`[B, H, N]` the tokens that go: those at the slot so far before the share's end, counted in the order of the text."""
        slot = state.share - self.tail
        slot = slot.where(slot >= 1, state.share // 2).view(-1, 1, 1)
        held = state.occupied.sum(-1, keepdim=True)
        place = state.positions.argsort(dim=-1, stable=True).argsort(dim=-1) - (state.positions.shape[-1] - held)
        excess = held - state.capacity.view(-1, 1, 1)
        return (place >= slot) & (place < slot + excess)


def _kept(lengths: list[int], drops: list[int], protected: int, target: int) -> list[int]:
    """Tokens left in each layer, `target` fewer in sum: what `drops` lacks is taken from the layers that hold most."""
    kept = [max(length - drop, min(length, protected)) for length, drop in zip(lengths, drops, strict=True)]
    for _ in range(target - (sum(lengths) - sum(kept))):
        kept[max(range(len(kept)), key=kept.__getitem__)] -= 1
    return kept
