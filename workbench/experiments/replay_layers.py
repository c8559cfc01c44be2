"""What a method would have done with a recording, by the engine's own layers, fed with the recorded q, k and v.

Methods that keep something beside K and V, divide their budget between layers or decide now and then need all of the
engine's bookkeeping, which replay's shorter way leaves out. Those that read only some of what they hold, move it or merge
it are asked what their attention would have given, since a mask over the recorded attention does not say.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

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


def follow(recording: Recording, policy: CachePolicy, chosen: Sequence[LayerTensors]) -> dict[int, Followed]:
    """What a policy does with the chosen layers: all of the recording if it ties them."""
    anatomy, prompt, steps = recording.trace.anatomy, recording.prompt_tokens, recording.steps
    seen = [_Seen(tensors, recording, policy) for tensors in chosen]
    gone = {each.tensors.layer: each.gone_and_more for each in seen}
    capacity = allocate(anatomy, policy, [prompt])
    call = _Noting(TraceWriter({}), gone=gone, capacity=capacity, prompt_tokens=[prompt], divided_at=[prompt])
    layers = [EngineLayer(tensors.layer, anatomy, policy, call) for tensors in chosen]
    appoint(leaders(layers, policy))
    for layer, tensors in zip(layers, chosen, strict=True):
        layer.rotation = rotation(tensors)
    for step in range(1 + (steps if "decode" in policy.acts or _changes_attention(policy) else 0)):
        start, stop = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
        call.step, call.phase, call.seen = step, "decode" if step else "prefill", [stop]
        call.kept, call.read = {}, {}
        call.positions = torch.arange(start, stop, dtype=torch.int32, device=chosen[0].keys.device)[None]
        for layer, each in zip(layers, seen, strict=True):
            _feed(layer, each, start, stop)
    return {tensors.layer: each.followed() for tensors, each in zip(chosen, seen, strict=True)}


@dataclass
class _Noting(Call):
    """A call that notes what layers drop where a replay looks for it."""

    gone: dict[int, torch.Tensor] = field(default_factory=dict)
    """By layer, as in `Followed`, with one column more, for what stays."""

    def record_evictions(self, layers: Sequence[int], dropped: torch.Tensor, into: torch.Tensor | None = None) -> None:
        """Notes the step at which tokens are gone. Arguments as in `Call`; there is one row."""
        for layer, positions in zip(layers, dropped.long(), strict=True):
            gone = self.gone[layer]
            gone.scatter_(1, positions.where(positions >= 0, gone.shape[1] - 1), self.step)


class _Seen:
    """What is noted of one layer, step by step."""

    def __init__(self, tensors: LayerTensors, recording: Recording, policy: CachePolicy):
        num_heads, total, _ = tensors.keys.shape
        self.tensors, self.prompt = tensors, recording.prompt_tokens
        shape = num_heads, total + 1
        self.gone_and_more = torch.full(shape, recording.steps, dtype=torch.int32, device=tensors.keys.device)
        self.gone = self.gone_and_more[:, :total]
        self.attends, self.selects = _changes_attention(policy), policy.selects
        self._outputs: list[torch.Tensor] = []
        self._read: list[torch.Tensor] = []

    def note(self, query: torch.Tensor, source: _Read) -> None:
        """Attends over what a step reads, in float32 as replays do, and notes what that is."""
        num_heads, total = self.gone.shape
        options = {"softcap": self.tensors.softcap, "sinks": self.tensors.sinks, "occupied": source.occupied}
        rows = attention_rows(query, source.keys, self.tensors.scaling, **options)[0]
        self._outputs.append((rows[:, :, 0] @ source.values[0].float()).view(num_heads, -1, source.values.shape[3]))
        if self.selects:
            positions = source.positions[0].long()
            read = torch.zeros(len(positions), total + 1, dtype=torch.bool, device=positions.device)
            read.scatter_(1, positions.where(positions >= 0, total), True)
            self._read.append(read[:, :total].view(num_heads, -1, total))

    def followed(self) -> Followed:
        """All of it."""
        output = torch.stack(self._outputs, 2) if self._outputs else None
        if not self._read:
            return Followed(self.gone, output)
        # A step that reads everything reads the same in all query heads of a group, whatever other steps do.
        widest = max(read.shape[1] for read in self._read)
        read = torch.stack([each.expand(-1, widest, -1) for each in self._read], 2)
        return Followed(self.gone, output, read, torch.stack([each.sum() for each in self._read]))


def _feed(layer: EngineLayer, seen: _Seen, start: int, stop: int) -> None:
    """Gives a layer the tokens of a call and lets the policy decide."""
    tensors = seen.tensors
    own = tensors.queries[None, :, start:stop]
    new = [each[None, :, start:stop] for each in (tensors.keys, tensors.values)]
    # The store takes the prompt's memory and evicts in place, so what it is given then are copies.
    layer.update(*([each.clone() for each in new] if layer.call.phase == "prefill" else new))
    query, source = layer.source(own)
    if layer.call.phase != "prefill":
        if seen.attends:
            seen.note(query, source)
        read = (query, source.keys) if isinstance(source, Source) else None
        options = {"softcap": tensors.softcap, "sinks": tensors.sinks, "occupied": source.occupied}
        layer.finish(own, tensors.scaling, read=read, **options)
        return
    if layer.observing and MASS in layer.policy.needs:
        layer.store.side[MASS].add_(tensors.prompt_mass)
    layer.rule(own, tensors.scaling)
