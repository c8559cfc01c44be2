"""What cache methods share: the policy's defaults, and small pure functions over scores.

Shapes: B batch, Hq query heads, H kv heads, G = Hq / H, N slots, W observed queries.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
import torch.nn.functional as F

from workbench.engine.policy import LayerState, Merged, ReadState, Rehearsal, Side
from workbench.methods.base import Budget, Method, resolve_budget
from workbench_kernels.attention_rows import attention_rows

PREFILL_ONLY = frozenset({"prefill"})
EVERY_STEP = frozenset({"prefill", "append", "decode"})


@dataclass(frozen=True)
class CacheMethod(Method):
    """A cache method: `keep` says which tokens stay; the engine really frees the rest."""

    slot: ClassVar[str] = "cache"
    needs: ClassVar[frozenset[str]] = frozenset()
    acts: ClassVar[frozenset[str]] = PREFILL_ONLY
    rowwise: ClassVar[bool] = False
    ragged: ClassVar[bool] = False
    """Whether each kv head may keep a number of its own; the capacity then is the mean over the heads of a layer."""
    side: ClassVar[Mapping[str, Side]] = {}
    observes: ClassVar[frozenset[str]] = EVERY_STEP
    merges: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    budget: Budget

    @property
    def joint(self) -> str | None:
        """Whether layers divide the budget by what they report, `at end` or in a `cascade`; here by `allocate` alone."""
        return None

    @property
    def every(self) -> int:
        """Tokens after the prompt between decisions."""
        return 1

    @property
    def by_slot(self) -> bool:
        """Whether attention takes a token's rank among those held for its position."""
        return False

    def with_budget(self, budget: Budget) -> Self:
        """The same method at another budget."""
        other = dataclasses.replace(self, budget=budget)
        return other if self.calibration is None else other.with_calibration(self.calibration)

    def table(self, name: str, state: LayerState) -> torch.Tensor:
        """A layer's row of a table of the calibration, on the layer's device."""
        return self.tables[name][self.calibration.layers.index(state.layer)].to(state.keys.device)

    def capacity(self, prompt_tokens: int) -> int:
        """Tokens each kv head may keep after a prompt of this length, on average over layers."""
        return resolve_budget(self.budget, prompt_tokens)

    def allocate(self, prompt_tokens: int, num_layers: int) -> list[int] | None:
        """The same for each of the layers the method acts on, first to last: here as much for each."""
        return [self.capacity(prompt_tokens)] * num_layers

    def rehearsal(self, rows: Sequence[Sequence[int]]) -> Rehearsal:
        """What to rehearse after a text, given as the tokens of each row. Only methods that need foresight define it."""
        raise TypeError(f"{type(self).__name__} must say what it rehearses: define rehearsal(rows).")

    def share(
        self, reports: Sequence[torch.Tensor], held: Sequence[Sequence[int]], prompt_tokens: Sequence[int], num_layers: int
    ) -> list[list[int]]:
        """Shares of the layers that have reported, by layer and row: see `CachePolicy`."""
        raise TypeError(f"{type(self).__name__} is joint and must say how layers share: define share(...).")

    def grown(self, share: int, divided_at: int, seen: int) -> int:
        """What has become of a share by now: here nothing changes it."""
        return share

    def observe(self, state: LayerState) -> dict[str, torch.Tensor]:
        """Side state anew, and a joint method's report."""
        raise TypeError(f"{type(self).__name__} must say what it observes: define observe(state).")

    def observation_cost(self, state: LayerState) -> tuple[int, int]:
        """FLOPs (of matrix products) and bytes one call of `observe` adds."""
        raise TypeError(f"{type(self).__name__} must say what observing costs: define observation_cost(state).")

    def leader(self, number: int, count: int) -> int | None:
        """Which layer chooses for the `number`-th of `count`: here each for itself."""
        return None

    def keep(self, state: LayerState) -> torch.Tensor:
        """`[B, H, N]` bool: the tokens that stay, at most `state.capacity[b]` in each row and head (if ragged, on average)."""
        raise TypeError(f"{type(self).__name__} must say what it keeps: define keep(state).")

    def thins_after(self, num_layers: int) -> tuple[int, ...]:
        """The layers whose tokens do not all go on to later layers: here they all do."""
        return ()

    def keep_and_pass(self, state: LayerState) -> tuple[torch.Tensor, torch.Tensor]:
        """In those layers: what `keep` returns, and `[B, N]` bool: the tokens that go on. Only methods that thin define it."""
        raise TypeError(f"{type(self).__name__} must say which tokens go on: define keep_and_pass(state).")

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """FLOPs (of matrix products) and bytes one decision adds."""
        return 0, 0

    def merge(self, state: LayerState, keep: torch.Tensor) -> Merged:
        """K and V of what stays: see `CachePolicy`."""
        raise TypeError(f"{type(self).__name__} merges and must say how: define merge(state, keep).")

    def page_sizes(self, layer: int) -> tuple[int, ...]:
        """Tokens a page at each level: see `CachePolicy`."""
        raise TypeError(f"{type(self).__name__} selects and must say of what: define page_sizes(layer).")

    def page_limits(self, held: int, prompt_tokens: int) -> tuple[int, int]:
        """Fewest and most pages a head reads at a decode step: see `CachePolicy`."""
        raise TypeError(f"{type(self).__name__} selects and must say how much: define page_limits(...).")

    def select(self, state: ReadState) -> torch.Tensor:
        """The pages that are read: see `CachePolicy`."""
        raise TypeError(f"{type(self).__name__} selects and must say what: define select(state).")

    def selection_cost(self, state: ReadState) -> tuple[int, int]:
        """FLOPs (of matrix products) and bytes one call of `select` adds."""
        raise TypeError(f"{type(self).__name__} must say what selecting costs: define selection_cost(state).")


def keep_top(scores: torch.Tensor, count: torch.Tensor, occupied: torch.Tensor) -> torch.Tensor:
    """The `count` (`[B]` or `[B, H]`) occupied slots of highest score in each row and head, `[B, H, N]` bool.

    Ties go to the earlier slot.
    """
    count = count.view(len(count), -1, 1)
    if bool((occupied.sum(-1, keepdim=True) == count + 1).all()):  # the usual case of a decode step, without a sort
        lowest = scores.clamp(max=torch.finfo(scores.dtype).max).masked_fill(~occupied, torch.inf)
        last = scores.shape[-1] - 1 - lowest.flip(-1).argmin(-1, keepdim=True)
        return occupied.scatter(-1, last, False)
    order = scores.masked_fill(~occupied, -torch.inf).argsort(dim=-1, descending=True, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, torch.arange(scores.shape[-1], device=scores.device).expand_as(order))
    return (rank < count) & occupied


def recent(state: LayerState, count: torch.Tensor) -> torch.Tensor:
    """The last `count[b]` tokens of each row, `[B, H, N]` bool."""
    return (state.positions > state.newest - count.view(-1, 1, 1)) & state.occupied


def observe_window(state: LayerState, window: int) -> torch.Tensor:
    """Attention of the last `window` queries over all held tokens, `[B, Hq, W, N]`: softmax over every visible key."""
    queries = state.queries[:, :, -window:]
    occupied = None if bool(state.occupied.all()) else state.occupied
    rows = attention_rows(queries, state.keys, state.scaling, occupied=occupied)
    return rows.flatten(1, 2)


def observing_cost(state: LayerState, num_queries: int) -> tuple[int, int]:
    """FLOPs and bytes of scoring all keys with so many queries a head: `2 Hq W N D`; keys read, scores written."""
    batch, num_q_heads, there, head_dim = state.queries.shape
    scores = batch * num_q_heads * min(num_queries, there) * state.keys.shape[2]
    return 2 * scores * head_dim, state.keys.nbytes + 4 * scores


def window_scores(state: LayerState, windows: torch.Tensor, pooling: str, kernel: int) -> torch.Tensor:
    """SnapKV's scores `[B, H, N]`: attention summed over the last `windows[b]` queries, pooled, then averaged over a group.

    The window's own tokens always stay: they score infinity, and lend nothing to their neighbours before the window.
    """
    widest = int(windows.max())
    attention = observe_window(state, widest)
    voting = attention.shape[2]  # of a decode step that decides after a swap there is one query
    votes = torch.arange(voting, device=windows.device) >= voting - windows.view(-1, 1)
    scores = (attention * votes[:, None, :, None]).sum(2).unflatten(1, (state.keys.shape[1], -1))
    is_window = recent(state, windows)
    pooled = pool_scores(scores.masked_fill(is_window.unsqueeze(2), 0), pooling, kernel)
    return pooled.mean(2).masked_fill(is_window, torch.inf)


def reduce_heads(scores: torch.Tensor, num_kv_heads: int) -> torch.Tensor:
    """Mean over the query heads of each kv head: `[B, Hq, ...]` to `[B, H, ...]` (query head h belongs to h // G)."""
    return scores.unflatten(1, (num_kv_heads, -1)).mean(2)


def pool_scores(scores: torch.Tensor, kind: str, size: int) -> torch.Tensor:
    """Pools along the last axis with stride 1, so that a high score lifts its neighbours. Average counts zero padding."""
    pool = F.max_pool1d if kind == "max" else F.avg_pool1d
    return pool(scores.flatten(0, -2), size, stride=1, padding=size // 2).view_as(scores)


def pseudo_tokens(rows: Sequence[Sequence[int]], count: int, prefix: int) -> tuple[tuple[int, ...], ...]:
    """`count` tokens a row that resemble its text: the first `prefix` and the last others, repeated where it is short."""
    first = min(prefix, count)
    last = count - first
    chosen = []
    for row in rows:
        repeated = [*row] * -(-count // len(row))
        chosen.append((*repeated[:first], *repeated[len(repeated) - last :]))
    return tuple(chosen)


def foreseen_scores(state: LayerState, pooling: str, kernel: int, keep_recent: int) -> torch.Tensor:
    """Scores `[B, H, N]`: attention from the rehearsed tokens, pooled unless `off`, averaged over a group.

    The last `keep_recent` tokens score infinity, as far as the budget reaches.
    """
    scores = state.foresight if pooling == "off" else pool_scores(state.foresight, pooling, kernel)
    is_recent = recent(state, state.capacity.clamp(max=keep_recent))
    return reduce_heads(scores, state.keys.shape[1]).masked_fill(is_recent, torch.inf)
