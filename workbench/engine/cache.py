"""The engine's cache: one layer object per decoder layer, which stores K and V, attends over them and evicts.

transformers calls `cache.update(k, v, layer_idx)` and hands whatever it returns to the attention function. So `update`
returns the layer itself in place of the keys, and the one attention function (`attention.py`) asks it to attend.
"""

from __future__ import annotations

import copy
import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from transformers.cache_utils import Cache, CacheLayerMixin

from workbench.engine.call import Call, Waiting
from workbench.engine.joint import divide, divides
from workbench.engine.leading import appoint, leaders
from workbench.engine.placing import placed
from workbench.engine.policy import FORESIGHT, MASS, QUERIES, ROTATION, THINNING, CachePolicy, LayerState, kept_beside
from workbench.engine.selection import Source, asks, pages_of, read_state, reads_beside
from workbench.engine.stores.ragged import RaggedStore
from workbench.engine.stores.rectangular import RectangularStore
from workbench.probes.importance import attention_mass, by_position, observes
from workbench.probes.rotation import Rotation, rotations
from workbench.trace.anatomy import Anatomy
from workbench.trace.schema import DRAFT, REHEARSAL, VERIFY
from workbench_kernels.attention_rows import attention_rows, blockwise_attention
from workbench_kernels.column_mass import column_mass, column_mass_flops
from workbench_kernels.decode_attention import decode_attention
from workbench_kernels.ragged_decode_attention import ragged_decode_attention


@dataclass
class _Rehearsing:
    """What a layer held before a rehearsal, and what the rehearsed tokens looked at so far."""

    length: int
    seen: int
    foresees: bool
    foresight: torch.Tensor | None = None


class EngineLayer(CacheLayerMixin):
    """One layer's cache. `policy` is None for dense and for sliding-window layers, which are left alone."""

    is_sliding = False

    def __init__(self, index: int, anatomy: Anatomy, policy: CachePolicy | None, call: Call):
        super().__init__()
        self.index = index
        self.attention = anatomy.layers[index].attention
        self.num_layers = anatomy.num_layers
        self.policy = policy
        self.call = call
        self.rotation: Rotation | None = None
        self.store: RectangularStore | RaggedStore = RectangularStore(kept_beside(policy))
        self.pages = pages_of(policy, index)
        self.leader: int | None = None
        """The layer that chooses for this one."""
        self.leads = False
        """Whether this one chooses for another."""
        self._seen = 0
        self._scaling = 1.0
        self._rehearsing: _Rehearsing | None = None
        self.undecided = False
        """Whether the policy came by a swap and has not had its say on what is held."""
        self.selected: torch.Tensor | None = None
        """`[B, S, N]` positions the last call read, if the policy chose them: see `Source`."""

    # What transformers asks of a cache layer. Positions and masks are the session's business: it passes its own, so
    # the sizes given here serve no one.

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Nothing to do before the first tokens."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[EngineLayer, None]:
        """Stores the new tokens `[B, H, Q, D]` and returns this layer in place of keys and values."""
        self.store.append(key_states, value_states, self.call.positions, self.call.has_padding)
        self._seen += key_states.shape[2]
        return self, None

    def get_seq_length(self) -> int:
        """Tokens seen, which is more than are held once something was evicted."""
        return self._seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Length and offset of a mask that is never built."""
        return self._seen + query_length, 0

    def get_max_length(self) -> int:
        """No maximum."""
        return -1

    # What an observing profile reads.

    @property
    def held_tokens(self) -> int:
        """Tokens held, over rows and kv heads."""
        return self.store.held_tokens()

    @property
    def physical_bytes(self) -> int:
        """Bytes allocated for this layer, bounds on pages included."""
        return self.store.nbytes + (self.pages.nbytes if self.pages is not None else 0)

    @property
    def keys(self) -> torch.Tensor | None:
        """`[B, H, N, D]` held keys."""
        return self.store.keys

    @keys.setter
    def keys(self, value: None) -> None:
        """The base class clears the attribute on construction; the store owns the keys."""

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention of the new queries `[B, Hq, Q, D]` over what is held, then the policy's decision.

        Returns the output as transformers expects it, `[B, Q, Hq, D]`.
        """
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        own, (query, source) = query, self.source(query)
        options = {"softcap": softcap, "sinks": s_aux, "occupied": source.occupied, "window": self.attention.window}
        asking = self.call.positions >= 0 if self.call.has_padding else None
        out, kernel = self._output(query, source, scaling, options)
        slots = self.store.mean_length if kernel == "ragged" else self.store.length
        selected = source.occupied if isinstance(source, Source) and source.length < slots else None
        self.call.record_attention(self.index, self.attention, query.shape, slots, kernel, selected)
        if self.call.phase == REHEARSAL:
            self._foresee(query, scaling, options)
            return out.transpose(1, 2), None
        if self.call.phase != DRAFT and observes(self.call.importance, query.shape[2]):
            mass, window = attention_mass(self.call.importance, query, source.keys, scaling, asking=asking, **options)
            spread = by_position(mass, source.positions, max(self.call.seen))
            self.call.masses.append((self.index, spread, window))
        if self.call.received is not None:
            self._receive(query, source, scaling, {"asking": asking, **options})
        if self.call.phase not in (DRAFT, VERIFY):  # whose tokens may be taken back
            self.forget()
        self._record("append", query.shape[0] * query.shape[2])
        if self.policy is not None and self.waits(query, options):
            self.call.waiting = [*self.call.waiting, Waiting(self, own, scaling)]
        elif self.policy is not None:
            read = (query, source.keys) if isinstance(source, Source) else None
            self.finish(own, scaling, read=read, asking=asking, **options)
        return out.transpose(1, 2), None

    def waits(self, query: torch.Tensor, options: dict) -> bool:
        """Whether the policy decides once all layers have run: at a decode step of plain attention, if it is rowwise."""
        plain = options["softcap"] is None and options["sinks"] is None and isinstance(self.store, RectangularStore)
        looks_back = self.policy.by_slot and MASS in self.policy.needs  # at keys as attention took them
        alike = self.policy.rowwise and self.pages is None and not looks_back
        return plain and alike and self.call.phase == "decode" and query.shape[2] == 1

    def finish(
        self, query: torch.Tensor, scaling: float, *, read: tuple[torch.Tensor, torch.Tensor] | None = None, **options: Any
    ) -> None:
        """What follows a call's attention: the policy observes it and decides, if it is its turn.

        `read` are queries and keys as attention took them, if not as they are.
        """
        if self.observing and MASS in self.policy.needs:
            self.add_mass(*(read or (query, self.store.keys)), scaling, **{"occupied": self.store.occupied, **options})
        self.rule(query, scaling)

    def swap(self, policy: CachePolicy | None) -> None:
        """Puts another policy in charge. It decides on what is held in the next call, even if it does not act in its phase.

        Accumulated attention goes on if both policies need it, starts at zero if only the new one does, and is freed
        if that does not; other side state starts anew. Slots are put in the order of the text, since a method of prompts
        may look at a token's neighbours.
        """
        self.store.sort()
        if policy is not None and not policy.ragged:
            self.store = self.store.rectangular()
        self.policy, self.pages = policy, pages_of(policy, self.index)
        self.leader, self.leads = None, False
        self.store.replace_side(kept_beside(policy))
        self.undecided = True

    def clone(self, call: Call) -> EngineLayer:
        """An independent copy that takes part in another session's calls."""
        other = copy.copy(self)
        other.store, other.call = self.store.clone(), call
        other.pages = self.pages.clone() if self.pages is not None else None
        return other

    def source(self, query: torch.Tensor) -> tuple[torch.Tensor, RectangularStore | RaggedStore | Source]:
        """The queries and what they read: all that is held, as it is, unless the policy selects or goes by slots."""
        policy, store = self.policy, self.store
        self.selected = None
        if isinstance(store, RaggedStore) or policy is None:
            return query, store
        if self.pages is not None:
            self.pages.add(store, query.shape[2])
            may, must = asks(policy, self.pages, self.call, store.length)
            if may:
                chosen, cost = self._select(query)
                source = self.pages.gather(store, chosen) or store
                self.selected = source.positions if isinstance(source, Source) else None
                if must:
                    self._record("select", 0)
                flops, moved = cost[0], cost[1] + reads_beside(source, self.attention.num_kv_heads)
                if flops or moved:
                    self._record("score", 0, flops, moved)
                return query, source
        if policy.by_slot and self.call.phase != "prefill":
            turned = placed(query, store, self.rotation)
            if turned is not None:
                self._record("place", 0, 0, 2 * store.keys.nbytes)
                return turned
        return query, store

    def _select(self, query: torch.Tensor) -> tuple[torch.Tensor, tuple[int, int]]:
        """The pages to read, and the FLOPs and bytes of choosing them: none if another layer has."""
        if self.leader in self.call.read:
            return self.call.read[self.leader], (0, 0)
        state = read_state(query, self.pages, self.call, self.index, self.store.length)
        chosen = self.policy.select(state)
        if self.leads:
            self.call.read[self.index] = chosen
        return chosen, self.policy.selection_cost(state)

    def _output(
        self, query: torch.Tensor, source: RectangularStore | RaggedStore | Source, scaling: float, options: dict
    ) -> tuple[torch.Tensor, str]:
        """Attention output `[B, Hq, Q, Dv]` and the kernel that computed it, which no method has a say in."""
        num_queries, window = query.shape[2], options["window"]
        plain = options["softcap"] is None and options["sinks"] is None
        if plain and num_queries == 1 and isinstance(source, RaggedStore):
            return ragged_decode_attention(query, *source.flat, scaling, longest=source.length), "ragged"
        keys, values, occupied = source.keys, source.values, options["occupied"]
        if plain and num_queries == 1:
            seen = slice(0 if window is None else -window, None)
            occupied = None if occupied is None else occupied[:, :, seen]
            return decode_attention(query, keys[:, :, seen], values[:, :, seen], scaling, occupied=occupied), "decode"
        fits = window is None or num_queries <= window
        if plain and fits and occupied is None and num_queries == source.length:
            grouped = self.attention.group > 1
            causal = F.scaled_dot_product_attention(query, keys, values, is_causal=True, scale=scaling, enable_gqa=grouped)
            return causal, "sdpa"
        return blockwise_attention(query, keys, values, scaling, **options), "blockwise"

    @property
    def observing(self) -> bool:
        """Whether the policy observes this call."""
        return self.policy is not None and (self.undecided or self.call.phase in self.policy.observes)

    def add_mass(self, query: torch.Tensor, keys: torch.Tensor, scaling: float, **options: Any) -> None:
        """Adds what each key received: a second pass over the scores, so that the output is the same without it."""
        batch, num_q_heads, num_queries, head_dim = query.shape
        received = column_mass(query, keys, scaling, **options)
        mass = self.store.side[MASS] + received.view(batch, self.attention.num_kv_heads, self.attention.group, -1).sum(2)
        self.store.put_side(MASS, mass)
        flops = column_mass_flops(batch, num_q_heads, num_queries, self.store.length, head_dim)
        self._record("score", 0, flops, keys.nbytes + query.nbytes + 2 * mass.nbytes)

    def _receive(
        self, query: torch.Tensor, source: RectangularStore | RaggedStore | Source, scaling: float, options: dict
    ) -> None:
        """Says what each position received of a call's attention, for a routing method."""
        mass = column_mass(query, source.keys, scaling, **options)
        self.call.received[self.index] = by_position(mass, source.positions, max(self.call.seen)).sum(1)
        batch, num_q_heads, num_queries, head_dim = query.shape
        flops = column_mass_flops(batch, num_q_heads, num_queries, source.keys.shape[2], head_dim)
        self.call.work(self.index, "method", changed=0, flops=flops, bytes=query.nbytes + source.keys.nbytes + mass.nbytes)

    def rule(self, query: torch.Tensor, scaling: float) -> None:
        """Lets the policy observe a call by its queries `[B, Hq, Q, D]`, and decide if it is its turn."""
        if self.policy is not None and FORESIGHT in self.policy.needs:
            return  # it decides at the end of a rehearsal
        undecided, self._scaling = self.undecided, scaling
        if self.index in self.call.capacity:
            dividing = self.policy.joint is not None and divides(self.call, self.policy, undecided)
            wanted = dividing if self.policy.joint else bool(self.policy.side)
            observed, state = self._observe(query) if wanted and self.observing else ({}, None)
            if dividing:
                divide(self, observed)
            elif self._is_turn() and self.is_over():
                self.decide(query, state=state)
            elif self.call.thinned is not None:
                self._record("due", 0)
                self._record("evict", self._record_absent())
        self.undecided = False

    def forget(self) -> None:
        """Drops what lies before a sliding window."""
        if self.attention.window is not None:
            self.store.keep_last(self.attention.window - 1)

    def take_back(self, count: int) -> None:
        """Takes the last `count` tokens of each row back."""
        self.store.crop(self.store.length - count)
        self._seen -= count
        self._record("crop", count * self.store.keys.shape[0])

    def is_due(self) -> bool:
        """Whether a policy that foresees has to decide after this call."""
        due = self.index in self.call.capacity and self._is_turn() and self.is_over()
        self.undecided = False
        return due

    def begin_rehearsal(self, foresees: bool) -> None:
        """From here on tokens are added that `end_rehearsal` takes back; if `foresees`, what they look at is summed."""
        self._rehearsing = _Rehearsing(self.store.length, self._seen, foresees)

    def record_adapter(self, flops: int, read_bytes: int) -> None:
        """Writes what adapters on the rehearsed tokens cost in this layer."""
        self._record("score", 0, flops, read_bytes)

    def end_rehearsal(self) -> None:
        """Takes the rehearsed tokens back and lets the policy decide by what they looked at."""
        rehearsing, self._rehearsing = self._rehearsing, None
        taken_back = (self.store.length - rehearsing.length) * self.store.keys.shape[0]
        self.store.crop(rehearsing.length)
        self._seen = rehearsing.seen
        self._record("crop", taken_back)
        if rehearsing.foresight is not None:
            self.decide(foresight=rehearsing.foresight)

    def _foresee(self, query: torch.Tensor, scaling: float, options: dict) -> None:
        """Adds the attention the rehearsed queries give to what was held before them."""
        self._record("append", query.shape[0] * query.shape[2])
        rehearsing, self._scaling = self._rehearsing, scaling
        if not rehearsing.foresees:
            return
        rows = attention_rows(query, self.store.keys, scaling, **options)
        self._record("score", 0, 2 * rows.numel() * query.shape[3], self.store.keys.nbytes + query.nbytes + rows.nbytes)
        given = rows[..., : rehearsing.length].sum(3).flatten(1, 2)
        rehearsing.foresight = given if rehearsing.foresight is None else rehearsing.foresight + given

    def _is_turn(self) -> bool:
        """Whether the policy acts after this call."""
        call, every = self.call, self.policy.every
        if self.undecided and every == 1:
            return True
        passed = call.since_prompt // every > (call.since_prompt - call.positions.shape[1]) // every
        return passed and call.phase in self.policy.acts

    def limits(self) -> list[int] | None:
        """Tokens each kv head may hold now, by row; None if there is no bound."""
        call = self.call
        if self.index not in call.capacity:
            return None
        return list(map(self.policy.grown, call.capacity[self.index], call.divided_at, call.seen))

    def shares(self) -> list[int]:
        """What the budget gave each row when it was divided."""
        return self.call.capacity[self.index]

    def is_over(self) -> bool:
        """Whether more is held than the policy may keep."""
        return not within(self.store, self.policy, self.limits(), self.attention.num_kv_heads)

    def _state(self, query: torch.Tensor | None, foresight: torch.Tensor | None = None) -> LayerState:
        store, call, keys = self.store, self.call, self.store.keys
        side, dividing = store.side, query is None and foresight is None
        return LayerState(
            keys=keys,
            values=store.values,
            positions=store.positions,
            capacity=torch.tensor(self.limits(), device=keys.device),
            scaling=self._scaling,
            layer=self.index,
            num_layers=self.num_layers,
            phase=call.phase,
            queries=query if QUERIES in self.policy.needs else None,
            mass=side.get(MASS),
            rotation=self.rotation,
            side={name: side[name] for name in self.policy.side},
            share=torch.tensor(self.shares(), device=keys.device),
            since_prompt=call.since_prompt,
            dividing=dividing,
            first=dividing or self.undecided or call.phase == "prefill",
            foresight=foresight,
        )

    def _observe(self, query: torch.Tensor) -> tuple[dict[str, torch.Tensor], LayerState]:
        """What the policy observes; its side state is put beside K and V. Also returns the state with it."""
        state = self._state(query)
        self._record("score", 0, *self.policy.observation_cost(state))
        observed = self.policy.observe(state)
        for name in state.side:
            self.store.put_side(name, observed[name])
        side = self.store.side
        return observed, dataclasses.replace(state, side={name: side[name] for name in state.side})

    def decide(
        self,
        query: torch.Tensor | None = None,
        foresight: torch.Tensor | None = None,
        state: LayerState | None = None,
    ) -> None:
        """Asks the policy what stays and frees the rest; without the call's queries if layers have divided the budget.

        `foresight` `[B, Hq, N]` is what rehearsed tokens looked at; `state` is what the policy has just observed, if it has.
        """
        self._record("due", 0)
        state = state or self._state(query, foresight)
        keep = self.call.kept.get(self.leader)
        flops, moved = self.policy.scoring_cost(state) if keep is None else (0, 0)
        if flops or moved:
            self._record("score", 0, flops, moved)
        num_absent = self._record_absent()
        if keep is None:
            keep = (self._keep_and_thin(state) if self._thins() else self.policy.keep(state)) & state.occupied
        if self.leads:
            self.call.kept[self.index] = keep
        dropped = torch.where(keep, -1, state.positions)
        num_dropped = int((dropped >= 0).sum())
        into = self._merge(state, keep) if num_dropped and self.policy.merges else None
        if num_dropped and self.policy.ragged:
            self._flatten()
        if num_dropped or num_absent:
            self._evicted(dropped, num_dropped, self.store.keep(keep) if num_dropped else 0, num_absent, into)

    def _flatten(self) -> None:
        """From here on each head takes memory for no more tokens than it holds."""
        if isinstance(self.store, RectangularStore):
            self.store = RaggedStore.of(self.store)

    def _merge(self, state: LayerState, keep: torch.Tensor) -> torch.Tensor:
        """Lets what leaves change K and V of what stays. Returns the positions it was merged into, -1 for none."""
        merged = self.policy.merge(state, keep)
        self.store = self.store.rectangular()  # of ragged ones K and V are copies, which cannot be written to
        self.store.keys.copy_(merged.keys)
        self.store.values.copy_(merged.values)
        return merged.into

    def _evicted(
        self, dropped: torch.Tensor, num_dropped: int, moved: int, num_absent: int = 0, into: torch.Tensor | None = None
    ) -> None:
        """Records an eviction: `dropped` `[B, H, N]` positions, -1 for what stays, how many those are, and the bytes moved.

        `num_absent` more tokens did not reach this layer and count as evicted from it; `into` is where merged ones went.
        """
        if self.pages is not None:
            self.pages.rebuild(self.store)
        self._record("evict", num_dropped + num_absent, 0, moved)
        self.call.record_evictions([self.index], dropped, into)

    def _thins(self) -> bool:
        """Whether only some tokens of a prompt go on after this layer."""
        policy = self.policy
        thins = self.call.phase == "prefill" and THINNING in policy.needs
        return thins and self.index in policy.thins_after(self.num_layers)

    def _keep_and_thin(self, state: LayerState) -> torch.Tensor:
        keep, passing = self.policy.keep_and_pass(state)
        self.call.thin(passing)
        return keep

    def _record_absent(self) -> int:
        """Writes the tokens that did not reach this layer as evicted from it. Returns how many, over rows and kv heads."""
        if self.call.thinned is None:
            return 0
        absent = self.call.thinned.absent[:, None].expand(-1, self.attention.num_kv_heads, -1)
        self.call.record_evictions([self.index], absent)
        return int((absent >= 0).sum())

    def _record(self, op: str, op_tokens: int, extra_flops: int = 0, extra_bytes: int = 0) -> None:
        row = (op, op_tokens, self.store.held_tokens(), self.physical_bytes, self._nominal_bytes(), extra_flops, extra_bytes)
        self.call.writer.add("cache", self.call.step, self.index, *row)

    def _nominal_bytes(self) -> int:
        """What the budget promises: K and V of as many tokens in each row and kv head as it allows."""
        tokens = self.call.seen
        limits = self.limits()
        if limits is not None:
            tokens = list(map(min, tokens, limits))
        if self.attention.window is not None:
            tokens = [min(seen, self.attention.window - 1) for seen in tokens]
        return sum(tokens) * self.attention.cached_elements * self.store.element_bytes


def within(store: RectangularStore | RaggedStore, policy: CachePolicy, capacity: list[int], num_kv_heads: int) -> bool:
    """Whether no row holds more than its capacity: in any kv head, or, if the policy is ragged, on average over them."""
    if policy.ragged:
        return all(held <= num_kv_heads * limit for held, limit in zip(store.total_by_row(), capacity, strict=True))
    return all(held <= limit for held, limit in zip(store.held_by_row(), capacity, strict=True))


def engine_cache(model: nn.Module, anatomy: Anatomy, policy: CachePolicy | None, call: Call) -> Cache:
    """A cache for a model, with the policy on the layers it may act on. Raises UserError if they lack what it needs."""
    acting = acting_layers(anatomy)
    layers = [EngineLayer(index, anatomy, policy if index in acting else None, call) for index in range(anatomy.num_layers)]
    appoint(leaders([layers[index] for index in acting], policy))
    _give_rotations(model, layers, policy)
    return Cache(layers=layers)


def _give_rotations(model: nn.Module, layers: list[EngineLayer], policy: CachePolicy | None) -> None:
    """Tells the layers how their keys were rotated, if the policy needs to know."""
    if policy is not None and (ROTATION in policy.needs or policy.by_slot):
        acting = [layer.index for layer in layers if layer.attention.window is None]
        for index, rotation in rotations(model, acting).items():
            layers[index].rotation = rotation


def acting_layers(anatomy: Anatomy) -> list[int]:
    """The layers a cache method may act on: those without a sliding window."""
    return [layer.index for layer in anatomy.layers if layer.attention.window is None]


def allocate(anatomy: Anatomy, policy: CachePolicy | None, prompt_lengths: list[int]) -> dict[int, list[int]]:
    """Tokens each kv head may keep, by layer and row; layers without a bound are left out."""
    acting = acting_layers(anatomy)
    shares = [policy.allocate(length, len(acting)) for length in prompt_lengths] if policy is not None else []
    bounded = [share for share in shares if share is not None]
    return {index: list(rows) for index, rows in zip(acting, zip(*bounded, strict=True), strict=True)} if bounded else {}


def swap_policy(model: nn.Module, cache: Cache, policy: CachePolicy | None) -> None:
    """Puts another policy in charge of every layer that has no sliding window. Raises UserError if they lack what it needs."""
    _give_rotations(model, cache.layers, policy)
    acting = [layer for layer in cache.layers if isinstance(layer, EngineLayer) and layer.attention.window is None]
    following = leaders(acting, policy)
    for layer in acting:
        layer.swap(policy)
    appoint(following)
