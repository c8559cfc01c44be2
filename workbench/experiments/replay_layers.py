"""What a method with state would have kept of a recording: the engine's own layers, fed with the recorded q, k and v.

Methods that keep something beside K and V, divide their budget between layers or decide now and then need all of the
engine's bookkeeping, which replay's shorter way leaves out.
"""

from __future__ import annotations

import torch

from workbench.engine.cache import EngineLayer, acting_layers, allocate
from workbench.engine.call import Call
from workbench.engine.policy import MASS, CachePolicy
from workbench.errors import UserError
from workbench.trace.recording import LayerTensors, Recording
from workbench.trace.store import TraceWriter


def has_state(policy: CachePolicy) -> bool:
    """Whether what a policy keeps at a step follows from more than one layer's cache and its budget at that step."""
    grows = policy.grown(1, 1, 2) > 1
    return bool(policy.side) or policy.joint is not None or policy.every > 1 or grows


def gone_by_layer(recording: Recording, policy: CachePolicy) -> dict[int, torch.Tensor]:
    """`[H, N]` int32 of each recorded layer: the step from which on a token is not held any more, the last one if it stays.

    Raises UserError for a joint policy if a layer that takes part was not recorded.
    """
    anatomy, prompt = recording.trace.anatomy, recording.prompt_tokens
    missing = set(acting_layers(anatomy)) - {layer.layer for layer in recording.layers}
    if policy.joint is not None and missing:
        raise UserError(
            f"{policy.name!r} divides its budget among all layers, and layers {sorted(missing)} were not recorded; "
            "record them all with wb.record(lm, prompt)."
        )
    call = Call(TraceWriter({}), capacity=allocate(anatomy, policy, [prompt]), prompt_tokens=[prompt], divided_at=[prompt])
    layers = [EngineLayer(tensors.layer, anatomy, policy, call) for tensors in recording.layers]
    after_prompt = recording.steps if "decode" in policy.acts else 0
    for step in range(after_prompt + 1):
        start, stop = (0, prompt) if step == 0 else (prompt + step - 1, prompt + step)
        call.step, call.phase, call.seen = step, "decode" if step else "prefill", [stop]
        call.positions = torch.arange(start, stop, dtype=torch.int32, device=recording.layers[0].keys.device)[None]
        for layer, tensors in zip(layers, recording.layers, strict=True):
            _feed(layer, tensors, start, stop)
    gone = {
        layer.layer: torch.full(layer.keys.shape[:2], recording.steps, dtype=torch.int32, device=layer.keys.device)
        for layer in recording.layers
    }
    for row in call.writer.tables()["evictions"].to_pandas().itertuples():
        gone[row.layer][row.head, row.position] = row.step
    return gone


def _feed(layer: EngineLayer, tensors: LayerTensors, start: int, stop: int) -> None:
    """Gives a layer the tokens of a call and lets the policy decide; nothing is attended."""
    query = tensors.queries[None, :, start:stop]
    # The store evicts in place, so what it is given are copies.
    layer.update(tensors.keys[None, :, start:stop].clone(), tensors.values[None, :, start:stop].clone())
    if layer.call.phase != "prefill":
        layer.finish(query, tensors.scaling, softcap=tensors.softcap, sinks=tensors.sinks)
        return
    if layer.observing and MASS in layer.policy.needs:
        layer.store.side[MASS].add_(tensors.prompt_mass)
    layer.rule(query, tensors.scaling)
