"""MPCache: drop once what the prompt's end leaves out, then read few clusters a step. Zeng et al. 2025, arXiv 2501.06807."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import QUERIES, LayerState, PageLevel, ReadState
from workbench.errors import UserError
from workbench.methods.base import Budget, knob, read_budget_knob, register, resolve_budget
from workbench.methods.cache.base import CacheMethod, keep_top
from workbench_kernels.column_mass import column_mass, column_mass_flops

_COARSE, _FINE = 32, 16
_BLOCK = 32
"""Queries whose attention without a mask is held at once."""
_FEWEST_LAYERS = 6
"""With fewer no odd layer but the outer ones is left."""


@register
@dataclass(frozen=True)
class MPCache(CacheMethod):
    """Drops once what the prompt's last queries leave out, then reads at each step the clusters most like its query."""

    name: ClassVar[str] = "mpcache"
    paper: ClassVar[str] = "Zeng et al. 2025, arXiv 2501.06807"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES})
    rowwise: ClassVar[bool] = True
    selects: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "The budget is what a kv head reads at a decode step; ratio2 says which share of the tokens kept that is, so "
        "budget / ratio2 of the prompt stay, or all of it where the budget is more than ratio2: then more than ratio2 is read.",
        "The first and the last cluster are read besides, the last one also where it is full; the paper's code misses the "
        "current token where its cluster is full and loses.",
        "static='topk' scores by attention as the model computes it, summed over the last fifth of the prompt's queries; "
        "static='code' drops what none of them gives theta without mask and scaling, and keeps within the budget all the same.",
        "Query heads of a group read the same clusters (mean of their similarities); what is dropped is the same in all heads.",
        "share_layers=True is the sharing between neighbouring layers of the paper's earlier code; it is off, as in the "
        "present one. Layers with a sliding window do not count, and a layer that an earlier method left with other tokens "
        "than its neighbour chooses for itself.",
        "What is dropped is really freed; the paper's code masks it.",
    )

    budget: Budget = read_budget_knob(0.06)
    static: str = knob("topk", choices=("topk", "code"), help="How the tokens that stay are scored at the end of the prompt.")
    theta: float = knob(
        0.0, low=0.0, high=1.0, help="Attention that some query must give a token for it to stay (static=code)."
    )
    ratio1: float = knob(0.5, low=0.0, high=1.0, unit="share", help="Clusters of 32 whose halves compete.")
    ratio2: float = knob(0.2, low=0.01, high=1.0, unit="share", help="Tokens kept that a step reads.")
    alpha: float = knob(0.6, low=0.0, high=1.0, help="Weight of a cluster's maximum; its minimum has the rest.")
    share_layers: bool = knob(
        False, help="Whether odd layers, but for the outer ones, keep and read what the layer before does."
    )

    def page_sizes(self, layer: int) -> tuple[int, ...]:
        """Clusters of 32, and of 16."""
        return _COARSE, _FINE

    def capacity(self, prompt_tokens: int) -> int:
        """Tokens each kv head keeps of a prompt."""
        return max(1, min(prompt_tokens, round(resolve_budget(self.budget, prompt_tokens) / self.ratio2)))

    def leader(self, number: int, count: int) -> int | None:
        """If layers share, the one before for odd layers from the third on; the last two choose for themselves."""
        if not self.share_layers:
            return None
        if count < _FEWEST_LAYERS:
            raise UserError(
                f"Layers share choices where {_FEWEST_LAYERS} or more have no sliding window, and this model has {count}; use "
                f"{self.name} with share_layers=false."
            )
        return number - 1 if number % 2 and 2 < number < count - 2 else None

    def keep(self, state: LayerState) -> torch.Tensor:
        """The tokens of highest score, the same in all heads; of those, under `static=code`, the ones that reach theta."""
        windows = state.prompt_tokens.clamp(min=1)
        windows = torch.where(windows > 24000, windows // 10, windows // 5).clamp(min=1)
        scores = self._scores(state, windows)[:, None].expand(state.positions.shape)
        kept = keep_top(scores, state.capacity, state.occupied)
        if self.static == "topk":
            return kept
        return kept & (scores >= self.theta) | keep_top(scores, torch.ones_like(state.capacity), state.occupied)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """The last fifth of the queries over all keys: `2 Hq W N D` FLOPs; keys and queries read, one score a token written."""
        batch, num_q_heads, num_queries, head_dim = state.queries.shape
        window = max(1, min(num_queries, num_queries // (10 if num_queries > 24000 else 5)))
        num_slots = state.keys.shape[2]
        flops = column_mass_flops(batch, num_q_heads, window, num_slots, head_dim)
        asked = batch * num_q_heads * window * head_dim * state.queries.element_size()
        return flops, state.keys.nbytes + asked + 4 * batch * num_slots

    def page_limits(self, held: int, prompt_tokens: int) -> tuple[int, int]:
        """Clusters of 16: a share of those held, and the first and the last, which may be among them."""
        count = int(-(-held // _FINE) * self._share(prompt_tokens))
        return max(count, 2), count + 2

    def select(self, state: ReadState) -> torch.Tensor:
        """The clusters of 16 most like the query, in those of 32 most like it; and the first and the last."""
        coarse, fine = state.levels
        shares = torch.tensor([self._share(each) for each in state.prompt_tokens], dtype=torch.double, device=fine.there.device)
        num_coarse, num_fine = coarse.there.sum(-1), fine.there.sum(-1)
        parents = (num_coarse * shares.clamp(min=self.ratio1)[:, None]).long().clamp(min=1)
        parents = keep_top(self._similarity(state.query, coarse), parents, coarse.there)
        children = parents.repeat_interleave(_COARSE // _FINE, 2)[..., : fine.there.shape[2]] & fine.there
        chosen = keep_top(self._similarity(state.query, fine), (num_fine * shares[:, None]).long(), children)
        number = torch.arange(chosen.shape[2], device=chosen.device)
        return chosen | (number == 0) | (number == num_fine[..., None] - 1)

    def selection_cost(self, state: ReadState) -> tuple[int, int]:
        """One product a kv head and cluster, `2 H (P32 + P16) D` FLOPs; bounds read, two a level written; results written."""
        flops = moved = 0
        for level in state.levels:
            batch, num_heads, count, head_dim = level.highest.shape
            flops += 2 * batch * num_heads * count * head_dim
            moved += (
                2 * batch * num_heads * (count + 2) * head_dim * level.highest.element_size() + 4 * batch * num_heads * count
            )
        return flops, moved

    def _share(self, prompt_tokens: int) -> float:
        """Share of the tokens kept that a step reads: ratio2, or more where all of a prompt stays and the budget is larger."""
        read, kept = resolve_budget(self.budget, prompt_tokens), self.capacity(prompt_tokens)
        return min(1.0, read / kept) if kept == prompt_tokens else self.ratio2

    def _similarity(self, query: torch.Tensor, level: PageLevel) -> torch.Tensor:
        """`[B, H, P]`, the mean over the query heads of a group."""
        mean = query.squeeze(2).unflatten(1, (level.highest.shape[1], -1)).mean(2, keepdim=True)
        return (mean @ centres(level, self.alpha).transpose(-1, -2)).squeeze(2).float()

    def _scores(self, state: LayerState, windows: torch.Tensor) -> torch.Tensor:
        """`[B, N]` score of each token: see `keep`. `windows` `[B]` queries vote in each row."""
        widest = min(int(windows.max()), state.queries.shape[2])
        queries = state.queries[:, :, -widest:]
        votes = torch.arange(widest, device=windows.device) >= widest - windows[:, None]
        occupied = state.occupied
        if self.static == "topk":
            return column_mass(queries, state.keys, state.scaling, asking=votes, occupied=occupied).mean(1)
        best = queries.new_zeros(state.positions.shape[0], state.positions.shape[2], dtype=torch.float32)
        keys = state.keys.repeat_interleave(queries.shape[1] // state.keys.shape[1], 1).transpose(-1, -2)
        hidden = ~occupied[:, :1].unsqueeze(2)
        for asked, voting in zip(queries.split(_BLOCK, 2), votes.split(_BLOCK, 1), strict=True):
            rows = (asked @ keys).float().masked_fill(hidden, -torch.inf).softmax(-1).mean(1)
            best = best.maximum((rows * voting[..., None]).amax(1))
        return best


def centres(level: PageLevel, alpha: float) -> torch.Tensor:
    """`[B, H, P, D]` the vector that stands for a cluster: alpha of the maximum of its keys, the rest of the minimum."""
    return alpha * level.highest + (1 - alpha) * level.lowest
