"""DuoAttention: few heads retrieve from far back, the others only stream. Xiao et al. 2024, arXiv 2410.10819."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Self

import torch

from workbench.engine.calibration import Samples
from workbench.engine.gates import train
from workbench.engine.policy import QUERIES, ROTATION, LayerState
from workbench.errors import UserError
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import EVERY_STEP, PREFILL_ONLY, CacheMethod, keep_top, reduce_heads
from workbench.methods.cache.budgets import by_gates, streaming, whole

_DISTANCE = 500
"""Positions over which a head's mean query looks back at its mean key."""


@register
@dataclass(frozen=True)
class DuoAttention(CacheMethod):
    """Keeps all tokens in the kv heads that look far back, and the first and most recent ones in the others."""

    name: ClassVar[str] = "duo-attention"
    paper: ClassVar[str] = "Xiao et al. 2024, arXiv 2410.10819"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES, ROTATION})
    ragged: ClassVar[bool] = True
    calibrated_by: ClassVar[tuple[str, ...]] = ("gates",)
    deviations: ClassVar[tuple[str, ...]] = (
        "gates='trained' follows the paper's training in small: 8 documents of 512 tokens in place of passkeys in long books, "
        "96 steps in place of 2,000, and streaming over 4 first and 32 recent tokens in place of 128 and 256, whatever the "
        "knobs are then.",
        "gates='calibrated' and gates='prompt' train nothing. Heads are told apart by kvpress's stand-in: how much the mean "
        "query, 500 positions on, still gives to early copies of the mean key. 'calibrated' takes it from a few texts "
        "(kvpress: 50) and ranks the heads of all layers together, as the paper does its gates; 'prompt' takes it from the "
        "prompt itself and ranks a layer's heads by themselves, since a layer evicts before the next one runs.",
        "The budget says how many heads stay whole; what they leave over lengthens the recent tokens of the others, so that "
        "the sum is exact. Where the budget is less than sinks and recent tokens, recent ones give way first.",
        "Where the gates are known beforehand streaming heads go on dropping tokens while decoding, and the budget grows by "
        "what whole heads add, rounded up to whole tokens a kv head; with gates='prompt' it acts once, as kvpress does.",
    )

    budget: Budget = budget_knob(0.5)
    sinks: int = knob(128, low=0, high=4096, unit="tokens", help="First tokens that streaming heads keep.")
    recent: int = knob(256, low=1, high=65536, unit="tokens", help="Most recent tokens that streaming heads keep, at least.")
    gates: str = knob(
        "trained",
        choices=("trained", "calibrated", "prompt"),
        help="What heads are ranked by: trained gates, a stand-in for them over a few texts, or the prompt.",
    )

    @property
    def needs_calibration(self) -> bool:
        """Unless the prompt is all it goes by."""
        return self.gates != "prompt"

    @property
    def acts(self) -> frozenset[str]:
        """At every step if it knows its gates."""
        return EVERY_STEP if self.needs_calibration else PREFILL_ONLY

    @classmethod
    def to_calibrate(cls) -> tuple[Self, ...]:
        """The stand-in and the training."""
        return cls(gates="calibrated"), cls(gates="trained")

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """`gates` `[L, H]`: trained ones, or the reach of each kv head, a text on average."""
        if self.gates == "prompt":
            raise UserError(
                f"{self.label!r} goes by the prompt and needs no calibration; choose gates=trained or gates=calibrated."
            )
        if self.gates == "trained":
            return {"gates": train(samples.lm, samples.documents, samples.advance)}
        reaches = [torch.cat([_reach(state).cpu() for state in sample.layers]) for sample in samples]
        return {"gates": torch.stack(reaches).mean(0)}

    def allocate(self, prompt_tokens: int, num_layers: int) -> list[int]:
        """With gates known beforehand a layer gets the more the more of the model's best heads are its own."""
        capacity = self.capacity(prompt_tokens)
        if self.gates == "prompt" or capacity >= prompt_tokens:
            return [capacity] * num_layers
        return by_gates(self.tables["gates"].tolist(), capacity, prompt_tokens, self.sinks + self.recent)

    def grown(self, share: int, divided_at: int, seen: int) -> int:
        """Whole heads grow with the text, if the others go on streaming."""
        if self.gates == "prompt":
            return share
        num_heads = self.tables["gates"].shape[1]
        added = self._num_whole(num_heads, share, divided_at) * (seen - divided_at)
        return share + -(-added // num_heads)

    def keep(self, state: LayerState) -> torch.Tensor:
        """Everything in the heads of highest gate or reach, sinks and recent tokens in the others."""
        reach = _reach(state) if self.gates == "prompt" else self.table("gates", state).expand(state.positions.shape[:2])
        counts = self._counts(state, reach)
        num_sinks = (counts - 1).clamp(min=0, max=self.sinks)[..., None]
        order = state.positions.float().masked_fill(state.positions < num_sinks, torch.inf)
        return keep_top(order, counts, state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """One query a head over 500 positions: `2 Hq 500 D` FLOPs; q and k read for their means. Nothing if calibrated."""
        if self.needs_calibration:
            return 0, 0
        batch, num_q_heads, _, head_dim = state.queries.shape
        return 2 * batch * num_q_heads * _DISTANCE * head_dim, state.queries.nbytes + state.keys.nbytes

    def _num_whole(self, num_heads: int, share: int, longest: int) -> int:
        """Heads of a layer that keep everything, of a share resolved when there were `longest` tokens."""
        if share >= longest:
            return num_heads
        return streaming(num_heads * share, num_heads, longest, self.sinks + self.recent)[0]

    def _counts(self, state: LayerState, reach: torch.Tensor) -> torch.Tensor:
        """`[B, H]` tokens each head keeps."""
        num_heads = reach.shape[1]
        longest = state.occupied.sum(-1).amax(1)
        known = self.needs_calibration and state.share is not None
        shares, lengths = (state.share, state.prompt_tokens) if known else (state.capacity, longest)
        orders = reach.argsort(dim=1, descending=True, stable=True).tolist()
        rows = zip(*(each.tolist() for each in (state.capacity, longest, shares, lengths)), orders, strict=True)
        counts = []
        for capacity, held, share, at, order in rows:
            num_whole = self._num_whole(num_heads, share, at)
            others = num_heads - num_whole
            rest = min(num_heads * min(capacity, held) - num_whole * held, others * held)
            by_rank = [held] * num_whole + (whole([rest / others] * others, rest) if others else [])
            counts.append([by_rank[order.index(head)] for head in range(num_heads)])
        return torch.tensor(counts, device=reach.device)


def _reach(state: LayerState) -> torch.Tensor:
    """`[B, H]` how far back each kv head looks: 1 if all its attention goes to the start, near 0 if to the last token.

    The head's mean key stands at 500 positions, its mean query at the last; both are taken before rotation. The score is
    the mean over positions of the attention summed up to each.
    """
    num_queries = state.queries.shape[2]
    asked = state.positions[:, 0, -num_queries:]
    query = _mean(state.rotation.undone(state.queries.float(), asked), (asked >= 0)[:, None])
    keys = state.rotation.undone(state.keys.float().flatten(0, 1)[:, None], state.positions.flatten(0, 1))
    key = _mean(keys.view(state.keys.shape), state.occupied)
    positions = torch.arange(_DISTANCE, device=key.device)[None]
    query = state.rotation.undone(query, -positions[:, -1:])
    key = state.rotation.undone(key.expand(-1, -1, _DISTANCE, -1), -positions)
    scores = query.unflatten(1, (key.shape[1], -1)).squeeze(3) @ key.transpose(-1, -2)
    looking = (scores * state.scaling).softmax(-1).cumsum(-1).mean(-1)
    return reduce_heads(looking.flatten(1, 2), key.shape[1])


def _mean(states: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Mean of `[B, H, N, D]` over the tokens that count, `[B, H or 1, N]`, as `[B, H, 1, D]`."""
    weights = counted / counted.sum(-1, keepdim=True)
    return (states * weights[..., None]).sum(2, keepdim=True)
