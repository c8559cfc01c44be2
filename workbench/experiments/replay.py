"""`wb.replay(recording, methods, budgets)`: what each method would have kept of a recorded run, at any budget.

The attention rows of the decoded tokens over all keys are computed once a layer. A kept set then is a mask on them:
what it lets through is the mass retained, and the masked row, made to sum to one again, gives the output the method
would have had. The policies are those that run live, on a `LayerState` of the recorded tensors, or where that is not
enough in the engine's own layers (`replay_layers.py`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from workbench.engine.cache import acting_layers, within
from workbench.engine.calibration import ready_for
from workbench.engine.policy import FORESIGHT, MASS, QUERIES, ROTATION, THINNING, CachePolicy, LayerState, kept_beside
from workbench.engine.stores.rectangular import RectangularStore
from workbench.errors import UserError
from workbench.experiments.rehearsed import continues, rehearsal_of
from workbench.experiments.replay_layers import Followed, check_complete, follow, goes_together, needs_layers, rotation
from workbench.methods.base import Budget, Method, parse_method
from workbench.methods.cache.base import CacheMethod
from workbench.probes.memory import free_bytes
from workbench.trace.recording import LayerTensors, Recording
from workbench.trace.replay import Point, Replay
from workbench_kernels.attention_rows import attention_rows

KEPT_BYTES = 512 * 2**20
"""Most bytes of attention rows that stay with a recording for the next replay of it; more are computed anew."""

BUDGETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def replay(recording: Recording, methods: Iterable[Method | str], budgets: Iterable[Budget] = BUDGETS) -> Replay:
    """Replays methods at budgets on a recording.

    Args:
        recording: made by `wb.record`. Its decoded tokens' attention rows, `[Hq, S, N]` float32 a layer, stay with it up to
            512 MiB, so that the next replay only decides anew; beyond that they are held a layer at a time.
        methods: methods, or their text form such as `snapkv:window=16`; their own budget does not matter.
        budgets: fractions of the prompt, or tokens a kv head.

    Raises:
        UserError: for a method without a budget or one that needs what no recording holds, no method or budget at all, and
            more memory than is free.
    """
    wanted = list({repr(budget): budget for budget in budgets}.values())  # 1 token is not 1.0 of the prompt
    families = [_at_budgets(given, wanted, recording) for given in methods]
    if not wanted or not families:
        raise UserError("There is nothing to replay: give at least one method and one budget.")
    _check_room(recording, families)
    with torch.inference_mode():
        at_once = [policy for family in families for policy in family if goes_together(recording, policy)]
        together = {policy.label: follow(recording, policy, recording.layers) for policy in at_once}

    def work(layer: LayerTensors) -> list[_Replayed]:
        scene = _scene(recording, layer)
        return [result for family in families for result in _family(recording, scene, family, together)]

    layers = _side_by_side(work, recording.layers)
    points = []
    for number, policy in enumerate(itertools.chain.from_iterable(families)):
        parts = [results[number] for results in layers]
        arrays = [torch.stack([getattr(part, each) for part in parts]).cpu().numpy() for each in _ARRAYS]
        read = np.stack([part.read for part in parts]) if policy.selects else None
        points.append(Point(_name(policy), policy.budget, policy.label, *arrays, read))
    return Replay.of(recording, points)


def why_not(recording: Recording, method: Method | str) -> str | None:
    """Why a method cannot be replayed on a recording, in a sentence; None if it can."""
    try:
        _at_budgets(method, [], recording)
    except UserError as error:
        return str(error)
    return None


def _check_room(recording: Recording, families: Sequence[Sequence[CacheMethod]]) -> None:
    """Raises UserError if what a replay holds at once is not free.

    That is rows thrice, and K and V of each budget, a thread; and one bit a token and step of what methods select.
    """
    largest, num_budgets = 0, len(families[0])
    selecting = sum(policy.selects for family in families for policy in family)
    heads = sum(layer.keys.shape[0] for layer in recording.layers)
    bits = selecting * heads * recording.steps * recording.tokens
    for layer in recording.layers:
        rows = 4 * layer.queries.shape[0] * recording.steps * recording.tokens
        largest = max(largest, 3 * rows + 2 * num_budgets * (layer.keys.nbytes + layer.values.nbytes))
    device = recording.layers[0].keys.device
    wanted, free = largest * _workers(recording.layers) + bits // 8, free_bytes(device)
    if free is not None and wanted > free:
        raise UserError(
            f"A replay of {recording!r} at {num_budgets} budgets takes about {wanted:,} bytes and {free:,} are free; "
            "record fewer new tokens, or replay fewer budgets at once."
        )


def _workers(layers: Sequence[LayerTensors]) -> int:
    return min(torch.get_num_threads(), len(layers)) if layers[0].keys.device.type == "cpu" else 1


def _side_by_side(work: Callable[[LayerTensors], list[_Replayed]], layers: Sequence[LayerTensors]) -> list[list[_Replayed]]:
    """Does the work on every layer: on a CPU one layer a thread, since the operations are too small to be divided."""
    threads, workers = torch.get_num_threads(), _workers(layers)

    def apart(layer: LayerTensors) -> list[_Replayed]:
        with torch.inference_mode():
            return work(layer)

    if workers == 1:
        return [apart(layer) for layer in layers]
    try:
        with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            return list(pool.map(apart, layers))
    finally:
        torch.set_num_threads(threads)  # part of the setting is the process's, not the thread's


def _scene(recording: Recording, layer: LayerTensors) -> _Scene:
    """The scene of a recorded layer, which stays with the recording if there is room for all of them."""
    known = recording.derived.get(layer.layer)
    if isinstance(known, _Scene):
        return known
    scene = _Scene.of(layer, recording)
    if scene.rows.nbytes * len(recording.layers) <= KEPT_BYTES:
        recording.derived[layer.layer] = scene
    return scene


def _at_budgets(given: Method | str, budgets: list[Budget], recording: Recording) -> list[CacheMethod]:
    """A method at each budget."""
    method = parse_method(given) if isinstance(given, str) else given
    if not isinstance(method, CacheMethod):
        raise UserError(f"{given!r} has no budget to replay; give methods that evict, such as 'h2o' or wb.SnapKV(window=16).")
    unknown = [layer.layer for layer in recording.layers if layer.frequencies is None]
    if (ROTATION in method.needs or method.by_slot) and unknown:
        raise UserError(
            f"{method.name!r} needs to know how the model rotates keys, which is unknown of layers {unknown}; choose another."
        )
    if THINNING in method.needs:
        raise UserError(
            f"{method.name!r} changes what later layers compute, so a dense recording cannot serve it; run it live."
        )
    if FORESIGHT in method.needs:
        _check_foresight(method, recording)
    meta = recording.trace.meta
    method = ready_for(method, meta.get("fingerprint"), meta.get("model", recording.trace.anatomy.class_name))
    check_complete(recording, method)
    return [method.with_budget(budget) for budget in budgets]


def _check_foresight(method: CacheMethod, recording: Recording) -> None:
    """A recording holds the model's own continuation, as far as it was recorded, and the rehearsals that were asked for."""
    rehearsal = rehearsal_of(method, recording.prompt)
    if rehearsal in recording.rehearsals or continues(rehearsal, recording.steps):
        return
    count = rehearsal["count"]
    if continues(rehearsal, count):
        raise UserError(
            f"{method.label!r} looks {count} tokens ahead and the recording has {recording.steps}; record with "
            f"new_tokens={count}, or let it look less far."
        )
    raise UserError(
        f"{method.label!r} rehearses tokens of its own, which this recording does not hold; give the method to "
        "wb.record(lm, prompt, rehearse=[method])."
    )


def _foresight(scene: _Scene, policy: CachePolicy) -> torch.Tensor:
    """`[1, Hq, P]` attention over the prompt from what was rehearsed, or from the recorded continuation, so far it looks."""
    rehearsal = rehearsal_of(policy, scene.prompt_ids)
    if rehearsal in scene.rehearsals:
        return scene.layer.foresight[scene.rehearsals.index(rehearsal)][None]
    return scene.rows[:, :, : rehearsal["count"], : scene.prompt].sum(2).flatten(0, 1)[None]


def _name(policy: Method) -> str:
    """The label without the budget."""
    knobs = [
        f"{knob.name}={getattr(policy, knob.name)}"
        for knob in dataclasses.fields(policy)
        if knob.name != "budget" and getattr(policy, knob.name) != knob.default
    ]
    return f"{policy.name}({', '.join(knobs)})" if knobs else policy.name


_ARRAYS = ("mass_retained", "output_error", "oracle_mass", "held_bytes", "read_bytes", "gone")


@dataclass(frozen=True)
class _Replayed:
    """One setup on one layer; shapes as in `Point`, without the layers."""

    mass_retained: torch.Tensor
    output_error: torch.Tensor
    oracle_mass: torch.Tensor
    held_bytes: torch.Tensor
    read_bytes: torch.Tensor
    gone: torch.Tensor
    read: np.ndarray | None


@dataclass(frozen=True)
class _Scene:
    """One layer of a recording, and what all setups share. Shapes: G query heads a kv head, otherwise as in `Point`."""

    layer: LayerTensors
    num_layers: int
    acting: list[int]
    """The layers methods act on, among which they share their budget."""
    prompt: int
    prompt_ids: list[int]
    rehearsals: tuple[dict[str, Any], ...]
    """Of the recording, whose foresight the layer holds."""
    rows: torch.Tensor
    """`[H, G, S, N]` float32 attention of the decoded tokens."""
    total: torch.Tensor
    """`[H, G, S]` sum of each row: one, less what a learned sink takes."""
    sink: torch.Tensor
    """`[H, G, S]` what a learned sink takes of each row: no token's, so no method's to lose."""
    values: torch.Tensor
    """`[H, N, Dv + 1]` float32 values with a column of ones, which sums the mass."""
    output: torch.Tensor
    """`[H, G, S, Dv]` the dense output."""

    @classmethod
    def of(cls, layer: LayerTensors, recording: Recording) -> _Scene:
        """The scene of a recorded layer."""
        prompt = recording.prompt_tokens
        rows = attention_rows(
            layer.queries[None, :, prompt:], layer.keys[None], layer.scaling, softcap=layer.softcap, sinks=layer.sinks
        )[0]
        values = F.pad(layer.values.float(), (0, 1), value=1.0)
        dense = (rows.flatten(1, 2) @ values).view(*rows.shape[:3], -1)
        return cls(
            layer=layer,
            num_layers=recording.trace.anatomy.num_layers,
            acting=acting_layers(recording.trace.anatomy),
            prompt=prompt,
            prompt_ids=recording.prompt,
            rehearsals=recording.rehearsals,
            rows=rows,
            total=dense[..., -1],
            sink=(1 - dense[..., -1]) * (layer.sinks is not None),
            values=values,
            output=dense[..., :-1],
        )

    @cached_property
    def best_mass_once(self) -> torch.Tensor:
        """`[H, S, P + 1]` the most mass a set of 0, 1, ... P of the prompt's tokens retains over all steps, at each of them.

        Mean over the group; what the decoded tokens receive, which all stay, is included.
        """
        rows = self.rows.mean(1)
        prompt = rows[..., : self.prompt]
        order = prompt.sum(1, keepdim=True).argsort(dim=-1, descending=True)
        decoded = rows[..., self.prompt :].sum(-1, keepdim=True)
        return F.pad(prompt.gather(2, order.expand_as(prompt)).cumsum(-1), (1, 0)) + decoded

    @cached_property
    def best_mass(self) -> torch.Tensor:
        """`[H, S, N + 1]` the most mass (mean over the group) any 0, 1, ... N tokens retain at a step."""
        ordered = self.rows.mean(1).sort(dim=-1, descending=True).values
        return F.pad(ordered.cumsum(-1), (1, 0))

    def attend(self, gone: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Mass on what is held and the values it sums, `[H, G, S]` and `[H, G, S, Dv]`, not yet made to sum to one."""
        steps = self.rows.shape[2]
        once = gone > 0
        if bool((once == (gone >= steps)).all()):
            seen = self.rows.flatten(1, 2) @ (self.values * once[..., None])
        else:
            held = gone[:, None] > torch.arange(steps, device=gone.device)[:, None]
            seen = (self.rows * held[:, None]).flatten(1, 2) @ self.values
        seen = seen.view(*self.rows.shape[:3], -1)
        return seen[..., -1], seen[..., :-1]


def _family(
    recording: Recording, scene: _Scene, policies: Sequence[CacheMethod], together: dict[str, dict[int, Followed]]
) -> Iterator[_Replayed]:
    """One method at each budget. Deciding at every step is many small operations, so its budgets go together."""
    layer = scene.layer
    if needs_layers(policies[0]):
        for policy in policies:
            known = together.get(policy.label) or follow(recording, policy, [layer])
            yield _replayed(scene, policy, known[layer.layer])
        return
    batches = [policies] if "decode" in policies[0].acts else [[policy] for policy in policies]
    gone = torch.cat([_gone(scene, batch) for batch in batches])
    for policy, each in zip(policies, gone, strict=True):
        yield _replayed(scene, policy, Followed(each))


def _replayed(scene: _Scene, policy: CachePolicy, followed: Followed) -> _Replayed:
    steps, gone, out = scene.rows.shape[2], followed.gone, followed.output
    mass, seen = scene.attend(gone) if followed.read is None else ((scene.rows * followed.read).sum(-1), None)
    if out is None:
        weight = mass + scene.sink
        out = seen / weight.clamp(min=torch.finfo(weight.dtype).tiny)[..., None]
    error = (out - scene.output).norm(dim=-1) / scene.output.norm(dim=-1)
    kept = (gone[:, None] > torch.arange(steps, device=gone.device)[:, None]).sum(-1)
    kept -= torch.arange(steps - 1, -1, -1, device=gone.device)  # tokens not decoded yet are not gone, but not held either
    layer = scene.layer
    a_token = (layer.keys.shape[-1] + layer.values.shape[-1]) * layer.keys.element_size()
    by_head = None if followed.read is None else followed.read.any(1)
    held_bytes = kept.sum(0) * a_token
    return _Replayed(
        mass_retained=(mass / scene.total).flatten(0, 1),
        output_error=error.flatten(0, 1),
        oracle_mass=_oracle(scene, policy, gone, kept if by_head is None else by_head.sum(-1)) / scene.total.mean(1),
        held_bytes=held_bytes,
        read_bytes=held_bytes if followed.tokens_read is None else followed.tokens_read * a_token,
        gone=gone,
        read=None if by_head is None else np.packbits(by_head.cpu().numpy(), axis=-1),
    )


def _oracle(scene: _Scene, policy: CachePolicy, gone: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """`[H, S]` mass retained by the best set of as many tokens as are read, `kept` `[H, S]`: see `Replay`."""
    if "decode" in policy.acts or policy.selects:
        return scene.best_mass.gather(2, kept[..., None])[..., 0]
    chosen = (gone[:, : scene.prompt] > 0).sum(-1)[:, None, None].expand(-1, scene.rows.shape[2], 1)
    return scene.best_mass_once.gather(2, chosen)[..., 0]


def _gone(scene: _Scene, policies: Sequence[CachePolicy]) -> torch.Tensor:
    """`[B, H, N]` int32: the step from which on each token is not held any more, S if it stays.

    `policies` is one method at B budgets, each a row of a batch: a policy reads its budget from the state's capacity.
    """
    layer, prompt, policy = scene.layer, scene.prompt, policies[0]
    steps = scene.rows.shape[2]
    num_heads, total, _ = layer.keys.shape
    device = layer.keys.device
    shares = [policy.allocate(prompt, len(scene.acting)) for policy in policies]
    limits = [None if share is None else share[scene.acting.index(layer.layer)] for share in shares]
    capacity = torch.tensor([total if limit is None else limit for limit in limits], device=device)
    gone = torch.full((len(policies), num_heads, total), steps, dtype=torch.int32, device=device)
    store = RectangularStore(kept_beside(policy))
    for step in range(-1, steps if "decode" in policy.acts else 0):
        token = slice(0, prompt) if step < 0 else slice(prompt + step, prompt + step + 1)
        positions = torch.arange(token.start, token.stop, dtype=torch.int32, device=device).expand(len(policies), -1)
        # The store evicts in place, so what it is given are copies.
        keys, values = (tensor[None, :, token].repeat(len(policies), 1, 1, 1) for tensor in (layer.keys, layer.values))
        store.append(keys, values, positions, has_padding=False)
        if MASS in policy.needs:
            store.side[MASS].add_(layer.prompt_mass if step < 0 else _received(scene, step, store.positions))
        _decide(scene, policy, store, capacity, token, gone, step + 1)
    return gone


def _received(scene: _Scene, step: int, positions: torch.Tensor) -> torch.Tensor:
    """`[B, H, C]` attention of a decoded token over what is held at `positions` `[B, H, C]`, summed over the group."""
    batch, group = positions.shape[0], scene.rows.shape[1]
    held = (positions >= 0).unsqueeze(2)
    index = positions.clamp(min=0).long().unsqueeze(2).expand(-1, -1, group, -1)
    seen = scene.rows[None, :, :, step].expand(batch, -1, -1, -1).gather(3, index) * held
    return (seen / (seen.sum(-1, keepdim=True) + scene.sink[:, :, step, None])).sum(2)


def _decide(
    scene: _Scene,
    policy: CachePolicy,
    store: RectangularStore,
    capacity: torch.Tensor,
    queries: slice,
    gone: torch.Tensor,
    step: int,
) -> None:
    """Lets the policy decide as the engine does, and notes in `gone` what it drops before a step."""
    if within(store, policy, capacity.tolist(), gone.shape[1]):
        return
    asked = scene.layer.queries[None, :, queries].expand(len(gone), -1, -1, -1) if QUERIES in policy.needs else None
    state = LayerState(
        keys=store.keys,
        values=store.values,
        positions=store.positions,
        capacity=capacity,
        scaling=scene.layer.scaling,
        layer=scene.layer.layer,
        num_layers=scene.num_layers,
        phase="prefill" if step == 0 else "decode",
        first=step == 0,
        queries=asked,
        mass=store.side.get(MASS),
        rotation=rotation(scene.layer) if ROTATION in policy.needs else None,
        foresight=_foresight(scene, policy) if FORESIGHT in policy.needs else None,
    )
    occupied = state.occupied
    keep = policy.keep(state) & occupied
    dropped = (~keep & occupied).nonzero(as_tuple=True)
    if len(dropped[0]):
        gone[dropped[0], dropped[1], state.positions[dropped].long()] = step
        if "decode" in policy.acts:  # otherwise nothing reads the store again
            store.keep(keep)
