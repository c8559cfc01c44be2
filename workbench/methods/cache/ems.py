"""EMS, evict then merge: what leaves goes into the token it is most like. Li et al. 2024, arXiv 2412.08521."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F

from workbench.engine.policy import MASS, QUERIES, LayerState, Merged
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import (
    PREFILL_ONLY,
    CacheMethod,
    keep_top,
    observe_window,
    observing_cost,
    recent,
    reduce_heads,
)
from workbench.methods.cache.budgets import in_proportion

_BLOCK = 512
"""Tokens compared with the centres at once."""
_COVERED = 0.9
"""Share of a head's scores that the tokens hold whose number says how spread its attention is."""


@register
@dataclass(frozen=True)
class EMS(CacheMethod):
    """Keeps, once the prompt is read, sinks, recent tokens and the most attended, and merges into these what resembles them."""

    name: ClassVar[str] = "ems"
    paper: ClassVar[str] = "Li et al. 2024, arXiv 2412.08521"
    needs: ClassVar[frozenset[str]] = frozenset({MASS, QUERIES})
    observes: ClassVar[frozenset[str]] = PREFILL_ONLY
    merges: ClassVar[bool] = True
    deviations: ClassVar[tuple[str, ...]] = (
        "No code of the paper was found: this is a reconstruction from descriptions of it. Window, sinks, thresholds, "
        "sizes of the groups and weights of a merge are ours.",
        "It acts once, at the end of the prompt; the paper merges while decoding as well, at a period that is not known.",
        "Every kv head keeps as many tokens. head_adaptive=True gives more room to heads whose attention is spread, as the "
        "paper does, in a way of ours: beyond sinks and recent tokens heads share the layer's budget in proportion to how many "
        "tokens hold 90% of their scores.",
        "Local and global scores are brought to one mean after the query heads of a group were averaged.",
        "merge_keys='none' leaves the keys of centres as they are, since directions of keys rotated by far positions are "
        "lost in a mean; the paper's way is 'directions'.",
        "So that small budgets still choose, the window is at most half the budget, and sinks are what it leaves.",
    )

    budget: Budget = budget_knob(256)
    window: int = knob(32, low=1, high=1024, unit="tokens", help="Last tokens, which stay and whose queries give local scores.")
    sinks: int = knob(4, low=0, high=1024, unit="tokens", help="First tokens that stay.")
    tau: float = knob(0.6, low=-1.0, high=2.0, help="Likeness from which on a token is merged; above 1 none is.")
    eps: float = knob(0.1, low=0.0, high=1.0, unit="of the mean", help="Score below which a token is dropped unmerged.")
    merge_keys: str = knob("none", choices=("none", "directions"), help="Whether the keys' directions are merged, too.")
    head_adaptive: bool = knob(False, help="Whether kv heads whose attention is spread keep more, and the others less.")
    clamp_negative: bool = knob(False, help="Whether two likenesses that are both negative count as none, not as high.")

    @property
    def ragged(self) -> bool:
        """If each kv head gets room of its own."""
        return self.head_adaptive

    def keep(self, state: LayerState) -> torch.Tensor:
        """Sinks, recent tokens and centres."""
        always, _ = self._always(state)
        scores = self._scores(state)
        counts = self._counts(state, scores, always) if self.head_adaptive else state.capacity
        return keep_top(scores.masked_fill(always, torch.inf), counts, state.occupied)

    def merge(self, state: LayerState, keep: torch.Tensor) -> Merged:
        """Each token that leaves goes into the centre it is most like, by its score, unless it is irrelevant or unlike all."""
        always, _ = self._always(state)
        scores = self._scores(state)
        centre = keep & ~always
        count = int(centre.sum(-1).max())
        none = torch.full_like(state.positions, -1)
        if not count:
            return Merged(state.keys, state.values, none)
        slots = centre.to(torch.int8).argsort(dim=-1, descending=True, stable=True)[..., :count]
        real = centre.gather(2, slots)
        mean = (scores * state.occupied).sum(-1, keepdim=True) / state.occupied.sum(-1, keepdim=True)
        leaving = state.occupied & ~keep & (scores >= self.eps * mean)
        nearest = self._nearest(state, slots, real).where(leaving, count)
        values = _absorbed(state.values, scores, slots, nearest)
        keys = state.keys
        if self.merge_keys == "directions":
            norms = keys.float().norm(dim=-1, keepdim=True)
            directions = _absorbed(F.normalize(keys.float(), dim=-1), scores, slots, nearest)
            keys = torch.where(centre[..., None], F.normalize(directions, dim=-1) * norms, keys.float()).to(keys.dtype)
        values = torch.where(centre[..., None], values.to(state.values.dtype), state.values)
        into = state.positions.gather(2, slots.gather(2, nearest.clamp(max=count - 1))).where(nearest < count, none)
        return Merged(keys, values, into)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """The window's queries over the keys, `2 Hq W N D` FLOPs, twice: `keep` and `merge` both score; and `2 H N C (D + Dv)`.

        C are the centres. Besides keys and scores, K and V are read for the likenesses and written once.
        """
        _, windows = self._always(state)
        flops, moved = observing_cost(state, int(windows.max()))
        batch, num_heads, num_slots, head_dim = state.keys.shape
        centres = max(0, int((state.capacity - windows).max()) - self.sinks)
        compared = 2 * batch * num_heads * num_slots * centres * (head_dim + state.values.shape[3])
        return 2 * flops + compared, 2 * moved + 2 * (state.keys.nbytes + state.values.nbytes)

    def _always(self, state: LayerState) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, H, N]` the sinks and recent tokens, and `[B]` how many of the latter there are."""
        windows = torch.minimum(state.capacity // 2, state.newest.view(-1) + 1).clamp(1, self.window)
        sinks = (state.capacity - windows).clamp(min=0, max=self.sinks)
        return recent(state, windows) | (state.positions < sinks.view(-1, 1, 1)) & state.occupied, windows

    def _counts(self, state: LayerState, scores: torch.Tensor, always: torch.Tensor) -> torch.Tensor:
        """`[B, H]` tokens each head keeps, `capacity` on average: those of `always`, more if its scores are spread."""
        spread = spreads(scores * state.occupied).tolist()
        stay = always.sum(-1)
        rooms = (state.occupied.sum(-1) - stay).tolist()
        spare = (len(spread[0]) * state.capacity - stay.sum(-1)).tolist()
        return stay + torch.tensor(list(map(in_proportion, spread, rooms, spare)), device=stay.device)

    def _scores(self, state: LayerState) -> torch.Tensor:
        """`[B, H, N]`: attention from all later queries, as a mean over them, and as much again from the last ones."""
        _, windows = self._always(state)
        rows = observe_window(state, int(windows.max()))
        voting = torch.arange(rows.shape[2], device=rows.device) >= rows.shape[2] - windows.view(-1, 1)
        local = reduce_heads((rows * voting[:, None, :, None]).sum(2), state.keys.shape[1]) / windows.view(-1, 1, 1)
        group = state.queries.shape[1] // state.keys.shape[1]
        exposure = (state.newest - state.positions + 1).clamp(min=1)
        overall = state.mass / group / exposure * state.occupied
        aligned = local.sum(-1, keepdim=True) / overall.sum(-1, keepdim=True).clamp(min=torch.finfo(overall.dtype).tiny)
        return overall * aligned + local

    def _nearest(self, state: LayerState, slots: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
        """`[B, H, N]` which of the C centres at `slots` `[B, H, C]` each token is most like, C if it is unlike all."""
        likenesses = []
        units = [F.normalize(states.float(), dim=-1) for states in (state.keys, state.values)]
        centres = [unit.gather(2, slots[..., None].expand(-1, -1, -1, unit.shape[3])).transpose(-1, -2) for unit in units]
        for parts in zip(*(unit.split(_BLOCK, 2) for unit in units), strict=True):
            cosines = [part @ centre for part, centre in zip(parts, centres, strict=True)]
            if self.clamp_negative:
                cosines = [cosine.clamp(min=0) for cosine in cosines]
            likeness = (cosines[0] * cosines[1]).masked_fill(~real[:, :, None], -torch.inf)
            likenesses.append(likeness.max(-1))
        best = torch.cat([each.values for each in likenesses], 2)
        return torch.cat([each.indices for each in likenesses], 2).where(best >= self.tau, slots.shape[2])


def spreads(scores: torch.Tensor, covered: float = _COVERED) -> torch.Tensor:
    """`[B, H]` how many of each head's tokens hold the share `covered` of its scores `[B, H, N]`."""
    held = scores.sort(dim=-1, descending=True).values.cumsum(-1)
    return (held < covered * held[..., -1:]).sum(-1) + 1


def _absorbed(states: torch.Tensor, weights: torch.Tensor, slots: torch.Tensor, nearest: torch.Tensor) -> torch.Tensor:
    """States `[B, H, N, D]` float32, those at `slots` `[B, H, C]` as means with what goes into them, by `weights` `[B, H, N]`.

    `nearest` `[B, H, N]` says into which of the C; number C is an extra row for what goes into none, and is left out.
    """
    weighted = states.float() * weights[..., None]
    index = slots[..., None].expand(-1, -1, -1, states.shape[3])
    total = F.pad(weights.gather(2, slots), (0, 1)).scatter_add(2, nearest, weights)[..., :-1]
    sums = F.pad(weighted.gather(2, index), (0, 0, 0, 1))
    sums = sums.scatter_add(2, nearest[..., None].expand(states.shape), weighted)[:, :, :-1]
    means = sums / total.clamp(min=torch.finfo(total.dtype).tiny)[..., None]
    return states.float().scatter(2, index, means)
