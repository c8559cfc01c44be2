"""What a method would have done with a recording, by the engine's own layers, fed with the recorded q, k and v.

Methods that keep something beside K and V, divide their budget between layers or decide now and then need all of the
engine's bookkeeping, which replay's shorter way leaves out. Those that read only some of what they hold, move it or merge
it are asked what their attention would have given, since a mask over the recorded attention does not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from workbench.engine.cache import EngineLayer, acting_layers, allocate
from workbench.engine.call import Call
from workbench.engine.leading import appoint, leaders
from workbench.engine.policy import MASS, CachePolicy
from workbench.engine.selection import Source
from workbench.engine.stores.ragged import RaggedStore
from workbench.engine.stores.rectangular import RectangularStore
from workbench.errors import UserError
from workbench.probes.rotation import Rotation
from workbench.trace.recording import LayerTensors, Recording
from workbench.trace.store import TraceWriter
from workbench_kernels.attention_rows import attention_rows

_Read = RectangularStore | RaggedStore | Source


@dataclass(frozen=True)
class Followed:
    """A method on one recorded layer. Shapes: H kv heads, G query heads each, S decoded tokens, N prompt and decoded ones."""

    gone: torch.Tensor
    """`[H, N]` int32: the step from which on a token is not held any more, S if it stays."""
    output: torch.Tensor | None = None
    """`[H, G, S, Dv]` float32 output of attention; None if it is that of the recorded attention over what is held."""
    read: torch.Tensor | None = None
    """`[H, G, S, N]` bool, or `[H, 1, S, N]` where a group reads the same: what each step reads; None: all that is held."""
    tokens_read: torch.Tensor | None = None
    """`[S]` tokens each step reads, over kv heads, or over query heads where each reads its own."""


def needs_layers(policy: CachePolicy) -> bool:
    """Whether what a policy keeps at a step, or what that gives, follows from more than K, V, queries and mass."""
    growing = (policy.ragged and "decode" in policy.acts) or policy.grown(1, 1, 2) > 1
    return bool(policy.side) or policy.joint is not None or policy.every > 1 or growing or _changes_attention(policy)


def _changes_attention(policy: CachePolicy) -> bool:
    return policy.by_slot or policy.merges or policy.selects


def rotation(tensors: LayerTensors) -> Rotation | None:
    """How the recorded layer rotates q and k; None if that is unknown."""
    if tensors.frequencies is None:
        return None
    return Rotation(torch.tensor(tensors.frequencies, device=tensors.keys.device), tensors.interleaved)


def is_tied(recording: Recording, policy: CachePolicy) -> bool:
    """Whether what one layer does follows from others: they divide a budget, or one chooses for another."""
    count = len(acting_layers(recording.trace.anatomy))
    return policy.joint is not None or any(policy.leader(number, count) is not None for number in range(count))


def check_complete(recording: Recording, policy: CachePolicy) -> None:
    """Raises UserError for a policy that ties layers if one that takes part was not recorded."""
    missing = set(acting_layers(recording.trace.anatomy)) - {layer.layer for layer in recording.layers}
    if missing and is_tied(recording, policy):
        does = "divides its budget among all layers" if policy.joint is not None else "lets layers choose for others"
        raise UserError(
            f"{policy.name!r} {does}, and layers {sorted(missing)} were not recorded; record them all with "
            "wb.record(lm, prompt)."
        )


def goes_together(recording: Recording, policy: CachePolicy) -> bool:
    """Whether all layers of a recording have to be followed at once, or take less work then."""
    return is_tied(recording, policy) or (needs_layers(policy) and policy.rowwise and are_alike(recording.layers))


def are_alike(layers: Sequence[LayerTensors]) -> bool:
    """Whether layers may be fed as the rows of a batch: nothing differs between them but what q, k and v hold."""
    first = layers[0]
    return all(each.sinks is None and _form(each) == _form(first) for each in layers)


def _form(layer: LayerTensors) -> tuple:
    shapes = layer.queries.shape, layer.keys.shape, layer.values.shape
    return *shapes, layer.scaling, layer.softcap, layer.frequencies, layer.interleaved


def follow(recording: Recording, policy: CachePolicy, chosen: Sequence[LayerTensors]) -> dict[int, Followed]:
    """What a policy does with the chosen layers: all of the recording if they go together."""
    anatomy, prompt, steps = recording.trace.anatomy, recording.prompt_tokens, recording.steps
    as_rows = policy.rowwise and not is_tied(recording, policy) and are_alike(chosen)
    seen = [_Seen(rows, recording, policy) for rows in ([chosen] if as_rows else [[tensors] for tensors in chosen])]
    num_rows = len(seen[0].rows)
    each_layer = allocate(anatomy, policy, [prompt])
    capacity = {each.layer: [each_layer[row.layer][0] for row in each.rows] for each in seen} if each_layer else {}
    gone = {each.layer: each.gone for each in seen}
    prompts = [prompt] * num_rows
    call = _Noting(TraceWriter({}), gone=gone, capacity=capacity, prompt_tokens=prompts, divided_at=prompts)
    layers = [_Layer(each.layer, anatomy, policy, call) for each in seen]
    appoint(leaders(layers, policy))
    for layer, each in zip(layers, seen, strict=True):
        layer.rotation = rotation(each.rows[0])
    for step in range(1 + (steps if "decode" in policy.acts or _changes_attention(policy) else 0)):
        start, stop = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
        call.step, call.phase, call.seen = step, "decode" if step else "prefill", [stop] * num_rows
        call.kept, call.read = {}, {}
        positions = torch.arange(start, stop, dtype=torch.int32, device=chosen[0].keys.device)
        call.positions = positions.expand(num_rows, -1)
        for layer, each in zip(layers, seen, strict=True):
            _feed(layer, each, start, stop)
    return {row.layer: followed for each in seen for row, followed in zip(each.rows, each.followed(), strict=True)}


class _Layer(EngineLayer):
    """A layer of which only what it decides matters, neither its memory nor its trace."""

    def _flatten(self) -> None:
        """Heads that hold less keep empty slots, since one length for all takes less work."""

    def _record(self, op: str, op_tokens: int, extra_flops: int = 0, extra_bytes: int = 0) -> None:
        """No one reads what a replay costs."""


@dataclass
class _Noting(Call):
    """A call that notes what layers drop where a replay looks for it."""

    gone: dict[int, torch.Tensor] = field(default_factory=dict)
    """`[R, H, N + 1]` by layer: see `_Seen`."""

    def record_evictions(self, layers: Sequence[int], dropped: torch.Tensor, into: torch.Tensor | None = None) -> None:
        """Notes the step at which tokens are gone. Arguments as in `Call`; there is one layer."""
        (layer,), positions = layers, dropped.long()
        gone = self.gone[layer]
        gone.scatter_(2, positions.where(positions >= 0, gone.shape[2] - 1), self.step)


class _Seen:
    """What is noted step by step of one layer, or of R that are its rows. Shapes as in `Followed`."""

    def __init__(self, rows: Sequence[LayerTensors], recording: Recording, policy: CachePolicy):
        first = rows[0]
        self.rows, self.layer = rows, first.layer
        self.queries, self.keys, self.values = (
            torch.stack([getattr(row, name) for row in rows]) if len(rows) > 1 else getattr(first, name)[None]
            for name in ("queries", "keys", "values")
        )
        num_heads, total, _ = first.keys.shape
        shape = len(rows), num_heads, total + 1
        self.gone = torch.full(shape, recording.steps, dtype=torch.int32, device=first.keys.device)
        """`[R, H, N + 1]`, one column more for what stays."""
        self.attends, self.selects = _changes_attention(policy), policy.selects
        self._outputs: list[torch.Tensor] = []
        self._read: list[torch.Tensor] = []

    def options(self, source: _Read) -> dict[str, Any]:
        """Of the attention over what is read."""
        return {"softcap": self.rows[0].softcap, "sinks": self.rows[0].sinks, "occupied": source.occupied}

    def note(self, query: torch.Tensor, source: _Read) -> None:
        """Attends over what a step reads, in float32 as replays do, and notes what that is."""
        num_rows, num_heads, more = self.gone.shape
        attention = attention_rows(query, source.keys, self.rows[0].scaling, **self.options(source))
        out = attention[:, :, :, 0] @ source.values.float()
        self._outputs.append(out.view(num_rows, num_heads, -1, out.shape[-1]))
        if self.selects:
            positions = source.positions.long()
            read = torch.zeros(*positions.shape[:2], more, dtype=torch.bool, device=positions.device)
            read.scatter_(2, positions.where(positions >= 0, more - 1), True)
            self._read.append(read[..., :-1].view(num_rows, num_heads, -1, more - 1))

    def followed(self) -> list[Followed]:
        """All of it, row by row."""
        count, gone = len(self.rows), self.gone[..., :-1]
        outputs = torch.stack(self._outputs, 3) if self._outputs else [None] * count
        if not self._read:
            return [Followed(*each) for each in zip(gone, outputs, strict=True)]
        # A step that reads everything reads the same in all query heads of a group, whatever other steps do.
        widest = max(read.shape[2] for read in self._read)
        read = torch.stack([each.expand(-1, -1, widest, -1) for each in self._read], 3)
        tokens_read = torch.stack([each.sum((1, 2, 3)) for each in self._read], 1)
        return [Followed(*each) for each in zip(gone, outputs, read, tokens_read, strict=True)]


def _feed(layer: EngineLayer, seen: _Seen, start: int, stop: int) -> None:
    """Gives a layer the tokens of a call and lets the policy decide."""
    own, scaling = seen.queries[:, :, start:stop], seen.rows[0].scaling
    new = [each[:, :, start:stop] for each in (seen.keys, seen.values)]
    # The store takes the prompt's memory and evicts in place, so what it is given then are copies.
    layer.update(*([each.clone() for each in new] if layer.call.phase == "prefill" else new))
    query, source = layer.source(own)
    if layer.call.phase != "prefill":
        if seen.attends:
            seen.note(query, source)
        read = (query, source.keys) if isinstance(source, Source) else None
        layer.finish(own, scaling, read=read, **seen.options(source))
        return
    if layer.observing and MASS in layer.policy.needs:
        layer.store.side[MASS].add_(torch.stack([row.prompt_mass for row in seen.rows]))
    layer.rule(own, scaling)
