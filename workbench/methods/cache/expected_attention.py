"""ExpectedAttention: what queries to come will look at, on average. Devoto et al. 2025, arXiv 2510.00636."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import QUERIES, ROTATION, LayerState
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top


@register
@dataclass(frozen=True)
class ExpectedAttention(CacheMethod):
    """Keeps, once the prompt is read, the tokens that future queries, taken as Gaussian, are expected to draw most from."""

    name: ClassVar[str] = "expected-attention"
    paper: ClassVar[str] = "Devoto et al. 2025, arXiv 2510.00636"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES, ROTATION})
    deviations: ClassVar[tuple[str, ...]] = (
        "Mean and covariance are of the prompt's own queries with their rotation undone, not of queries projected anew from "
        "hidden states; the two are the same but for rounding.",
        "It acts once, at the end of the prompt; kvpress can repeat it every few hundred tokens.",
    )

    budget: Budget = budget_knob(0.2)
    sinks: int = knob(4, low=0, high=1024, unit="tokens", help="First tokens that always stay and do not count as queries.")
    future: int = knob(512, low=1, high=65536, unit="tokens", help="Positions to come over which the rotation is averaged.")
    epsilon: float = knob(0.0, low=0.0, high=1.0, help="Added to every expected attention before it is weighed by the value.")

    def keep(self, state: LayerState) -> torch.Tensor:
        """The sinks, and the tokens of highest expected attention times the norm of their value."""
        is_sink = (state.positions < self.sinks) & state.occupied
        mean, covariance = self._future_queries(state)
        keys = state.keys.float()[:, :, None]
        linear = (keys @ mean.unsqueeze(-1)).squeeze(-1)
        quadratic = ((keys @ covariance) * keys).sum(-1)
        expected = state.scaling * linear + 0.5 * state.scaling**2 * quadratic
        hidden = (is_sink | ~state.occupied)[:, :, None]
        attention = expected.masked_fill(hidden, torch.finfo(expected.dtype).min).softmax(-1).mean(2)
        scores = (attention + self.epsilon) * torch.linalg.vector_norm(state.values, dim=-1, dtype=torch.float32)
        return keep_top(scores.masked_fill(is_sink, torch.inf), state.capacity, state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """Covariance and quadratic form: `2 Hq D^2 (Q + N)` FLOPs, and `2 Hq N D`; q, k and v read, scores written."""
        batch, num_q_heads, num_queries, head_dim = state.queries.shape
        num_slots = state.keys.shape[2]
        flops = 2 * batch * num_q_heads * head_dim * (head_dim * (num_queries + num_slots) + num_slots)
        read = state.queries.nbytes + state.keys.nbytes + state.values.nbytes
        return flops, read + 4 * batch * num_q_heads * num_slots

    def _future_queries(self, state: LayerState) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean `[B, H, G, D]` and covariance `[B, H, G, D, D]` of the queries at the positions to come."""
        num_kv_heads, num_queries = state.keys.shape[1], state.queries.shape[2]
        positions = state.positions[:, 0, -num_queries:]
        newest = state.newest.view(-1, 1)
        counted = (positions >= newest.clamp(max=self.sinks)).float()
        weights = (counted / counted.sum(-1, keepdim=True))[:, None, :, None]
        queries = state.rotation.undone(state.queries.float(), positions)
        mean = (queries * weights).sum(2, keepdim=True)
        centred = queries - mean
        covariance = (centred * weights).transpose(-1, -2) @ centred
        first = newest.view(-1) + 1
        for _ in range(2):  # both sides of the matrix: R S, then R (R S)^T
            covariance = state.rotation.averaged(covariance, first, self.future).transpose(-1, -2)
        mean = state.rotation.averaged(mean, first, self.future).squeeze(2)
        return mean.unflatten(1, (num_kv_heads, -1)), covariance.unflatten(1, (num_kv_heads, -1))
