"""Quest: keep everything, read the pages that may matter to this query. Tang et al. 2024, arXiv 2406.10774."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.policy import PageLevel, ReadState
from workbench.methods.base import Budget, knob, read_budget_knob, register
from workbench.methods.cache.base import CacheMethod, keep_top

_FEWEST_PAGES = 3


@register
@dataclass(frozen=True)
class Quest(CacheMethod):
    """Keeps every token, and at each decode step reads the pages whose keys may score highest with its query."""

    name: ClassVar[str] = "quest"
    paper: ClassVar[str] = "Tang et al. 2024, arXiv 2406.10774"
    acts: ClassVar[frozenset[str]] = frozenset()
    selects: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "The query heads of a group read the same pages, those that any of them scores highest, so that the budget is what a "
        "kv head reads; share_heads=false lets each choose for itself, as the paper's code does, and the group reads more.",
        "Appended turns are read densely, as prompts are.",
    )

    budget: Budget = read_budget_knob(0.2)
    page: int = knob(16, low=1, high=1024, unit="tokens", help="Tokens a page.")
    dense_layers: int = knob(2, low=0, high=1024, unit="layers", help="First layers, which read everything.")
    share_heads: bool = knob(True, help="Whether the query heads of a kv head read the same pages.")

    def page_sizes(self, layer: int) -> tuple[int, ...]:
        """Pages of one size, but in the first layers."""
        return () if layer < self.dense_layers else (self.page,)

    def allocate(self, prompt_tokens: int, num_layers: int) -> None:
        """No bound on what is held."""

    def page_limits(self, held: int, prompt_tokens: int) -> tuple[int, int]:
        """The whole pages that fit into the budget, at least three; all if all tokens fit."""
        budget = self.capacity(prompt_tokens)
        most = -(-held // self.page) if held <= budget else max(_FEWEST_PAGES, budget // self.page)
        return most, most

    def select(self, state: ReadState) -> torch.Tensor:
        """The pages of highest bound."""
        (level,) = state.levels
        scores = page_scores(state.query, level)
        if self.share_heads:
            scores = scores.unflatten(1, (level.there.shape[1], -1)).amax(2)
        there = level.there.repeat_interleave(scores.shape[1] // level.there.shape[1], 1)
        rows = zip(state.held, state.prompt_tokens, strict=True)
        most = [self.page_limits(*row)[1] for row in rows]
        return keep_top(scores.float(), torch.tensor(most, device=scores.device), there)

    def selection_cost(self, state: ReadState) -> tuple[int, int]:
        """Two products of a query with P bounds a head, `4 Hq P D` FLOPs; bounds read, one page's written, scores written."""
        (level,) = state.levels
        batch, num_kv_heads, num_pages, head_dim = level.highest.shape
        num_q_heads, size = state.query.shape[1], level.highest.element_size()
        bounds = 2 * batch * num_kv_heads * (num_pages + 2) * head_dim * size
        return 4 * batch * num_q_heads * num_pages * head_dim, bounds + batch * num_q_heads * num_pages * size


def page_scores(query: torch.Tensor, level: PageLevel) -> torch.Tensor:
    """`[B, Hq, P]` the sum over elements d of `max(q_d highest_d, q_d lowest_d)`, which no key's product with q exceeds.

    Where q_d is positive the highest key gives the larger product, else the lowest: so it is two matrix products.
    """
    folded = query.squeeze(2).unflatten(1, (level.highest.shape[1], -1))
    up, down = folded.clamp(min=0), folded.clamp(max=0)
    scores = up @ level.highest.transpose(-1, -2) + down @ level.lowest.transpose(-1, -2)
    return scores.flatten(1, 2)
