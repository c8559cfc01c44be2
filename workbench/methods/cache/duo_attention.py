"""DuoAttention: few heads retrieve from far back, the others only stream. Xiao et al. 2024, arXiv 2410.10819."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import QUERIES, ROTATION, LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top, reduce_heads
from workbench.methods.cache.budgets import streaming

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
    deviations: ClassVar[tuple[str, ...]] = (
        "No gates are trained. Heads are told apart by kvpress's stand-in, taken from the prompt itself and not from 50 texts: "
        "how much the mean query, 500 positions on, still gives to early copies of the mean key.",
        "The heads that retrieve are chosen in each layer by itself, since a layer evicts before the next one runs; trained "
        "gates are ranked over the whole model. A layer that cannot afford one whole head streams in all.",
        "The budget says how many heads stay whole; what they leave over lengthens the recent tokens of the others, so that "
        "the sum is exact. Where the budget is less than sinks and recent tokens, recent ones give way first.",
        "It acts once, at the end of the prompt, as kvpress does; the paper's streaming heads go on dropping tokens as they "
        "decode.",
    )

    budget: Budget = budget_knob(0.5)
    sinks: int = knob(128, low=0, high=4096, unit="tokens", help="First tokens that streaming heads keep.")
    recent: int = knob(256, low=1, high=65536, unit="tokens", help="Most recent tokens that streaming heads keep, at least.")

    def keep(self, state: LayerState) -> torch.Tensor:
        """Everything in the heads of highest reach, sinks and recent tokens in the others."""
        counts = self._counts(state, _reach(state))
        num_sinks = (counts - 1).clamp(min=0, max=self.sinks)[..., None]
        order = state.positions.float().masked_fill(state.positions < num_sinks, torch.inf)
        return keep_top(order, counts, state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """One query a head over 500 positions: `2 Hq 500 D` FLOPs; q and k read for their means."""
        batch, num_q_heads, _, head_dim = state.queries.shape
        return 2 * batch * num_q_heads * _DISTANCE * head_dim, state.queries.nbytes + state.keys.nbytes

    def _counts(self, state: LayerState, reach: torch.Tensor) -> torch.Tensor:
        """`[B, H]` tokens each head keeps."""
        num_heads = reach.shape[1]
        longest = state.occupied.sum(-1).amax(1).tolist()
        counts = []
        for capacity, held, order in zip(
            state.capacity.tolist(), longest, reach.argsort(dim=1, descending=True, stable=True).tolist(), strict=True
        ):
            total = num_heads * min(capacity, held)
            num_whole, others = streaming(total, num_heads, held, self.sinks + self.recent)
            by_rank = [held] * num_whole + others
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
