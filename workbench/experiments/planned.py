"""What a cache method would do to a run that has not happened: asked of the method itself, by tensors that have only a shape.

How many tokens it reads and holds follows from its budget as in the engine; what it costs is its own `scoring_cost`,
`observation_cost` and `selection_cost`. So a plan and a recording say the same, and a test holds them equal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from workbench.cost.under_method import LayerCosts, Says
from workbench.engine.cache import acting_layers
from workbench.engine.policy import FORESIGHT, MASS, THINNING, LayerState, PageLevel, ReadState, kept_beside
from workbench.errors import UserError
from workbench.methods.base import Method, parse_method
from workbench.methods.cache.base import CacheMethod
from workbench.trace.anatomy import Anatomy, Attention
from workbench_kernels.column_mass import column_mass_flops

_DTYPES = {1: torch.int8, 2: torch.bfloat16, 4: torch.float32, 8: torch.float64}
_POSITION_BYTES = 4


def planned(method: Method | str) -> Says:
    """What a method says of a planned run.

    Where kv heads or layers share a budget by what they see, each is taken at its mean; where a method selects at least so many
    pages and at most so many, it is taken to read the most; a cascade of layers is taken to decide once.

    Raises:
        UserError: for a method without a budget, and for one whose runs have other calls or other tokens than a dense run has.
            What it returns raises it for a method that has to be calibrated first.
    """
    given = parse_method(method) if isinstance(method, str) else method
    if not isinstance(given, CacheMethod):
        raise UserError(f"{given.label!r} has no budget to plan with; give a cache method such as 'snapkv:budget=0.2'.")
    if given.needs_calibration and given.calibration is None:
        raise UserError(f"{given.name!r} has to be calibrated for a model before its plan is known; run it live.")
    if FORESIGHT in given.needs:
        raise UserError(f"{given.name!r} rehearses tokens after the prompt, which a plan does not foresee; run it live.")
    if THINNING in given.needs:
        raise UserError(
            f"{given.name!r} changes how many tokens later layers read, which a plan does not foresee; run it live."
        )

    def says(anatomy: Anatomy, prompt: int, seen: Sequence[int]) -> dict[int, LayerCosts]:
        acting = acting_layers(anatomy)
        shares = given.allocate(prompt, len(acting))
        known: dict[tuple, LayerCosts] = {}  # layers that are alike cost the same
        costs = {}
        for place, index in enumerate(acting):
            layer = _Layer(
                given, anatomy.layers[index].attention, anatomy.element_bytes, prompt, *_bounds(given, shares, place, index)
            )
            alike = (layer.attention, layer.limit, layer.page_sizes)
            costs[index] = known[alike] = known.get(alike) or layer.costs(seen)
        return costs

    return says


def _bounds(method: CacheMethod, shares: list[int] | None, place: int, index: int) -> tuple[int | None, tuple[int, ...]]:
    """The tokens a kv head of a layer may hold, and the pages it selects from."""
    return None if shares is None else shares[place], method.page_sizes(index) if method.selects else ()


@dataclass(frozen=True)
class _Layer:
    """One layer of a run of one row."""

    method: CacheMethod
    attention: Attention
    element_bytes: int
    prompt: int
    limit: int | None
    page_sizes: tuple[int, ...]

    def costs(self, seen: Sequence[int]) -> LayerCosts:
        """The prefill and the decode steps after which so many tokens have been seen."""
        since = [tokens - self.prompt for tokens in seen]
        held = [self.prompt, *map(self.holds, since)]
        calls = [self._call(slots, step) for slots, step in zip(held, [0, *since], strict=True)]
        return LayerCosts(
            kv_read=tuple(map(self.reads, held, [0, *since])),
            kv_held=tuple(held),
            scoring_flops=tuple(flops for flops, _, _ in calls),
            scoring_bytes=tuple(scored for _, scored, _ in calls),
            moved_bytes=tuple(moved for _, _, moved in calls),
        )

    def holds(self, since: int) -> int:
        """Tokens a kv head holds at the `since`-th decode step, before the method's decision there."""
        every, acts = self.method.every, self.method.acts
        if self.limit is None or not acts:
            return self.prompt + since
        if "decode" in acts and since > every:
            rest = (since - 1) % every + 1
            return min(self.prompt + since, self._limit(since - rest) + rest)
        start = min(self.prompt, self._limit(0)) if "prefill" in acts else self.prompt
        return start + since

    def reads(self, held: int, since: int) -> int:
        """Tokens a kv head reads of those held."""
        if not (since and self.page_sizes):
            return held
        size = self.page_sizes[-1]
        most = self.method.page_limits(held, self.prompt)[1]
        return most * size if -(-held // size) > most else held

    def _limit(self, since: int) -> int:
        return self.method.grown(self.limit, self.prompt, self.prompt + since)

    def _call(self, slots: int, since: int) -> tuple[int, int, int]:
        """FLOPs and bytes of scoring, and bytes moved, in the prefill (`since` 0) or a decode step."""
        method, attention = self.method, self.attention
        phase, queries = ("decode", 1) if since else ("prefill", self.prompt)
        flops = moved = scored = 0
        if since and self.page_sizes:
            selecting = self._selecting(slots)
            flops, scored = selecting
        if since and method.by_slot and slots < self.prompt + since:
            moved += 2 * self._state(slots, since).keys.nbytes
        if self.limit is None:
            return flops, scored, moved
        state = self._state(slots, since)
        due = phase in method.acts and since // method.every > (since - queries) // method.every
        over = slots > self._limit(since)
        if phase in method.observes:
            observing = []
            if MASS in method.needs:
                product = column_mass_flops(1, attention.num_q_heads, queries, slots, attention.head_dim)
                observing.append((product, state.keys.nbytes + state.queries.nbytes + 2 * state.mass.nbytes))
            if (not since) if method.joint else bool(method.side):
                observing.append(method.observation_cost(state))
            flops, scored = flops + sum(each for each, _ in observing), scored + sum(each for _, each in observing)
        if due and over:
            decided = method.scoring_cost(state)
            left = 1 if slots == self._limit(since) + 1 else self._limit(since)
            flops, scored = flops + decided[0], scored + decided[1]
            moved += 2 * left * attention.num_kv_heads * self._token_bytes()
        return flops, scored, moved

    def _token_bytes(self) -> int:
        """K, V, position and side state of one token in one kv head."""
        beside = sum(side.nbytes for side in kept_beside(self.method).values())
        return (self.attention.head_dim + self.attention.value_dim) * self.element_bytes + _POSITION_BYTES + beside

    def _selecting(self, slots: int) -> tuple[int, int]:
        fewest, _ = self.method.page_limits(slots, self.prompt)
        if -(-slots // self.page_sizes[-1]) <= fewest:
            return 0, 0
        levels = tuple(self._level(size, -(-slots // size)) for size in self.page_sizes)
        query = self._shaped(self.attention.num_q_heads, 1, self.attention.head_dim)
        return self.method.selection_cost(ReadState(query, levels, 0, (slots,), (self.prompt,)))

    def _level(self, size: int, pages: int) -> PageLevel:
        bounds = self._shaped(self.attention.num_kv_heads, pages, self.attention.head_dim)
        return PageLevel(size, bounds, bounds, bounds[..., 0])

    def _state(self, slots: int, since: int) -> _ShapeState:
        attention = self.attention
        heads, queries = attention.num_kv_heads, 1 if since else self.prompt
        beside = {name: _empty(side.dtype, heads, slots, *side.shape) for name, side in kept_beside(self.method).items()}
        return _ShapeState(
            keys=self._shaped(heads, slots, attention.head_dim),
            values=self._shaped(heads, slots, attention.value_dim),
            positions=_empty(torch.int32, heads, slots),
            capacity=torch.tensor([self._limit(since) if self.limit is not None else slots]),
            scaling=1.0,
            layer=0,
            num_layers=1,
            phase="decode" if since else "prefill",
            queries=self._shaped(attention.num_q_heads, queries, attention.head_dim),
            mass=beside.get(MASS),
            side={name: beside[name] for name in self.method.side},
            since_prompt=since,
            dividing=bool(self.method.joint) and not since,
            last=self.prompt + since - 1,
        )

    def _shaped(self, *shape: int) -> torch.Tensor:
        return _empty(_DTYPES[self.element_bytes], *shape)


@dataclass(frozen=True)
class _ShapeState(LayerState):
    """A layer's state whose tensors hold no numbers; what a method may ask of the newest token is known all the same."""

    last: int = 0

    @property
    def newest(self) -> torch.Tensor:
        """`[1, 1, 1]` position of the newest token."""
        return torch.tensor([[[self.last]]])


def _empty(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """`[1, *shape]` in the memory of one element: on the device meta, a method could not mix it with tensors of its own."""
    return torch.zeros(1, dtype=dtype).expand(1, *shape)
