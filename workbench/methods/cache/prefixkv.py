"""PrefixKV: every layer keeps the same share of its importance. Wang et al. 2024, arXiv 2412.03409."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import torch

from workbench.engine.calibration import Sample
from workbench.engine.policy import AT_END, MASS, REPORT, LayerState
from workbench.errors import UserError
from workbench.methods.base import Budget, budget_knob, knob, register, resolve_budget
from workbench.methods.cache.base import EVERY_STEP, PREFILL_ONLY, CacheMethod, keep_top, recent
from workbench.methods.cache.budgets import prefix_drops

_GRID = tuple(number / 20 for number in range(1, 20))
"""The budgets a calibration knows the drops at. Between them, and on to keeping nothing or all, they lie on straight lines."""


@register
@dataclass(frozen=True)
class PrefixKV(CacheMethod):
    """Keeps in each layer as many tokens as hold the same share of its attention, and that ratio while it decodes."""

    name: ClassVar[str] = "prefixkv"
    paper: ClassVar[str] = "Wang et al. 2024, arXiv 2412.03409"
    needs: ClassVar[frozenset[str]] = frozenset({MASS})
    acts: ClassVar[frozenset[str]] = EVERY_STEP
    observes: ClassVar[frozenset[str]] = PREFILL_ONLY
    calibrated_by: ClassVar[tuple[str, ...]] = ("ratios", "sinks")
    deviations: ClassVar[tuple[str, ...]] = (
        "The budget is the share kept; the paper's code is given the share dropped.",
        "Ratios are solved for each prompt at its end. The paper's default is ratios='calibrated': a layer's mean over a few "
        "texts, here eight recall documents of 512 tokens. One calibration serves all budgets, on straight lines between every "
        "twentieth of the prompt; the paper's code has a file for each.",
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
    ratios: str = knob(
        "prompt", choices=("prompt", "calibrated"), help="What layers' ratios are solved for: the prompt, or a calibration."
    )

    @property
    def needs_calibration(self) -> bool:
        """Only if its ratios are to be calibrated ones."""
        return self.ratios == "calibrated"

    @classmethod
    def to_calibrate(cls) -> tuple[Self, ...]:
        """The way that goes by a calibration."""
        return (cls(ratios="calibrated"),)

    @property
    def joint(self) -> str | None:
        """The ratios are solved once the last layer has reported; calibrated ones are known before."""
        return AT_END if self.ratios == "prompt" else None

    def calibrate(self, samples: Iterable[Sample]) -> dict[str, torch.Tensor]:
        """`drops` `[L, 19]`: the share of its tokens that a layer drops at each budget of the grid, a text on average."""
        if self.ratios == "prompt":
            raise UserError(f"{self.label!r} goes by the prompt and needs no calibration; choose ratios=calibrated.")
        return {"drops": torch.stack([self._drops(sample) for sample in samples]).mean(0)}

    def allocate(self, prompt_tokens: int, num_layers: int) -> list[int]:
        """What is left in each layer after its calibrated drops."""
        capacity = self.capacity(prompt_tokens)
        if self.ratios == "prompt" or capacity >= prompt_tokens:
            return [capacity] * num_layers
        budgets, budget = (0.0, *_GRID, 1.0), capacity / prompt_tokens
        drops = [np.interp(budget, budgets, (1.0, *row, 0.0)) * prompt_tokens for row in self.tables["drops"].tolist()]
        target = (prompt_tokens - capacity) * num_layers
        return _kept([prompt_tokens] * num_layers, [int(drop + 1e-6) for drop in drops], self._protected(capacity), target)

    def observe(self, state: LayerState) -> dict[str, torch.Tensor]:
        """Attention each token has received from all heads, highest first, `[B, N]`."""
        return {REPORT: _importance(state)}

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
            of_row = [each[row, : lengths[row]] for each, lengths in zip(importance, held, strict=True)]
            rows.append(self._solved(of_row, self.capacity(prompt)))
        return [list(layer) for layer in zip(*rows, strict=True)]

    def grown(self, share: int, divided_at: int, seen: int) -> int:
        """A layer keeps its ratio, so its share grows with the text."""
        return share * seen // divided_at

    def keep(self, state: LayerState) -> torch.Tensor:
        """At the end of the prompt, the sinks, the newest and the most attended; later all but what passes a fixed slot."""
        if not state.first:
            return ~self._passing(state)
        sinks = (state.capacity - 1).clamp(max=self.sinks).view(-1, 1, 1)
        stays = (state.positions < sinks) | recent(state, torch.ones_like(state.capacity))
        scores = (state.mass * state.occupied).sum(1, keepdim=True).expand(state.positions.shape)
        return keep_top(scores.masked_fill(stays, torch.inf), state.capacity, state.occupied)

    def _protected(self, capacity: int) -> int:
        """Tokens every layer keeps: sinks and the newest, as far as the budget reaches."""
        return min(self.sinks, capacity - 1) + 1

    def _solved(self, importance: Sequence[np.ndarray], capacity: int) -> list[int]:
        """What is left in each layer of so important tokens, highest first."""
        lengths, protected = [len(each) for each in importance], self._protected(capacity)
        target = max(sum(lengths) - capacity * len(lengths), 0)
        return _kept(lengths, prefix_drops(importance, protected, target), protected, target)

    def _drops(self, sample: Sample) -> torch.Tensor:
        """`[L, 19]` float64 for one text; what a layer drops sums to exactly what each budget leaves."""
        importance = [_importance(state)[0].double().cpu().numpy() for state in sample.layers]
        length = len(importance[0])
        kept = torch.tensor([self._solved(importance, resolve_budget(budget, length)) for budget in _GRID]).T
        dropped = 1 - kept.double() / length
        return dropped * (1 - torch.tensor(_GRID, dtype=torch.float64)) / dropped.mean(0).clamp(min=1e-9)

    def _passing(self, state: LayerState) -> torch.Tensor:
        """`[B, H, N]` the tokens that go: those at the slot so far before the share's end, counted in the order of the text."""
        slot = state.share - self.tail
        slot = slot.where(slot >= 1, state.share // 2).view(-1, 1, 1)
        held = state.occupied.sum(-1, keepdim=True)
        place = state.positions.argsort(dim=-1, stable=True).argsort(dim=-1) - (state.positions.shape[-1] - held)
        excess = held - state.capacity.view(-1, 1, 1)
        return (place >= slot) & (place < slot + excess)


def _importance(state: LayerState) -> torch.Tensor:
    """`[B, N]` attention each token has received from all heads, highest first."""
    return (state.mass * state.occupied).sum(1).sort(dim=-1, descending=True).values


def _kept(lengths: list[int], drops: list[int], protected: int, target: int) -> list[int]:
    """Tokens left in each layer, `target` fewer in sum: what `drops` lacks is taken from the layers that hold most."""
    kept = [max(length - drop, min(length, protected)) for length, drop in zip(lengths, drops, strict=True)]
    for _ in range(target - (sum(lengths) - sum(kept))):
        kept[max(range(len(kept)), key=kept.__getitem__)] -= 1
    return kept
