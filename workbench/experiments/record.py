"""`wb.record(lm, prompt)`: a dense run with the queries, keys and values a replay needs."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from workbench.engine.session import Session
from workbench.errors import UserError
from workbench.experiments.rehearsed import foresight, to_rehearse
from workbench.methods.base import Method
from workbench.models.fingerprint import fingerprint
from workbench.models.load import LM
from workbench.probes.attention import AttentionProbe
from workbench.probes.memory import free_bytes
from workbench.probes.queries import QueryProbe
from workbench.probes.rotation import rotations
from workbench.trace.anatomy import Anatomy
from workbench.trace.recording import Recording

MEMORY_LIMIT_BYTES = 2 * 2**30


def record(
    lm: LM,
    prompt: str | Sequence[int] | torch.Tensor,
    *,
    new_tokens: int = 32,
    layers: str | Sequence[int] = "all",
    rehearse: Iterable[Method | str] = (),
    memory_limit_bytes: int = MEMORY_LIMIT_BYTES,
) -> Recording:
    """Runs a prompt and its greedy continuation densely and keeps q, k and v of the chosen layers, as attention saw them.

    What each prompt token received in attention is summed on the way: a replay would take as long again to find out.
    The tensors stay on the model's device.

    Args:
        lm: the model.
        prompt: one prompt, as text or token ids.
        new_tokens: tokens to decode; their queries are what a replay is measured on. The run does not stop at an end token.
        layers: `all`, or layer indices. Sliding-window layers, which no cache method touches, are left out of `all`.
        rehearse: methods of which what they rehearse after the prompt is recorded, too, so that a replay can serve them: those
            that rehearse tokens of their own (`dapq`, `lookahead-kv`), or look further ahead than `new_tokens`. Each
            different rehearsal takes one more run of the prompt; methods that rehearse nothing are left out.
        memory_limit_bytes: most bytes the tensors may take; checked before anything runs.

    Raises:
        UserError: for a layer that is not there or slides, several prompts, a rehearsal that cannot be, or a recording over the
            limit or over what is free.
    """
    if new_tokens < 1:
        raise UserError(f"Cannot record {new_tokens} new tokens; a replay needs 1 or more.")
    chosen = _chosen(lm.anatomy, layers)
    ids = _ids(lm, prompt)
    total = len(ids) + new_tokens
    if lm.anatomy.max_positions is not None and total > lm.anatomy.max_positions:
        raise UserError(
            f"{total} tokens do not fit: {lm.name} has a context of {lm.anatomy.max_positions}; shorten the prompt."
        )
    rehearsing = to_rehearse(rehearse, ids, new_tokens)
    size = recording_bytes(lm.anatomy, chosen, len(ids), total, len(rehearsing))
    if size > memory_limit_bytes:
        raise UserError(
            f"Recording {len(chosen)} layers over {total} tokens takes {size:,} bytes and the limit is {memory_limit_bytes:,}; "
            "choose fewer layers or tokens, or raise memory_limit_bytes."
        )
    free = free_bytes(lm.device)
    if free is not None and size > free:
        raise UserError(
            f"Recording {len(chosen)} layers over {total} tokens takes {size:,} bytes and {free:,} are free; "
            "choose fewer layers or tokens."
        )
    foreseen = [foresight(lm, method, ids) for method, _ in rehearsing]
    session = Session(lm)
    taken = QueryProbe(chosen, total)
    probe = AttentionProbe(lm.model, taken)
    try:
        probe.attach()
        session.prefill(ids)
        session.generate(new_tokens, stop_at_end=False)
    finally:
        probe.detach()
    stores = {index: session._cache.layers[index].store for index in chosen}
    recorded = [
        dataclasses.replace(
            taken.layer(index, store.keys[0], store.values[0]),
            **_rotation(lm, index),
            foresight=torch.stack([seen[index] for seen in foreseen]) if foreseen else None,
        )
        for index, store in stores.items()
    ]
    session._call.writer.update_meta(fingerprint=fingerprint(lm), model=lm.name)
    session.close()
    return Recording(session.trace, tuple(recorded), len(ids), tuple(rehearsal for _, rehearsal in rehearsing))


def recording_bytes(anatomy: Anatomy, layers: Sequence[int], prompt_tokens: int, tokens: int, num_rehearsals: int = 0) -> int:
    """Bytes of q, k, v of some layers over `tokens` tokens, and of the mass and the foresight of the prompt (float32)."""
    attention = [anatomy.layers[index].attention for index in layers]
    elements = sum(a.num_q_heads * a.head_dim + a.num_kv_heads * (a.head_dim + a.value_dim) for a in attention)
    scores = sum(a.num_kv_heads + num_rehearsals * a.num_q_heads for a in attention)
    return tokens * elements * anatomy.element_bytes + 4 * prompt_tokens * scores


def _rotation(lm: LM, layer: int) -> dict[str, Any]:
    """How a layer rotates q and k, as a recording holds it; nothing where it is unknown, which few methods have to know."""
    try:
        found = rotations(lm.model, [layer])[layer]
    except UserError:
        return {}
    return {"frequencies": tuple(found.frequencies.tolist()), "interleaved": found.interleaved}


def _chosen(anatomy: Anatomy, layers: str | Sequence[int]) -> list[int]:
    growing = [layer.index for layer in anatomy.layers if layer.attention.window is None]
    if isinstance(layers, str):
        if layers != "all":
            raise UserError(f"Cannot record layers {layers!r}; write 'all' or a list of layer indices, such as [0, 3].")
        layers = growing
    for index in layers:
        if index not in range(anatomy.num_layers):
            raise UserError(f"There is no layer {index}; this model has layers 0 to {anatomy.num_layers - 1}.")
        if index not in growing:
            raise UserError(f"Layer {index} has a sliding window, which no cache method touches; choose among {growing}.")
    if not layers:
        raise UserError("There is no layer to record: every layer has a sliding window, or the list of layers is empty.")
    return sorted(set(layers))


def _ids(lm: LM, prompt: str | Sequence[int] | torch.Tensor) -> list[int]:
    """Token ids of the only prompt."""
    given: Any = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
    if isinstance(given, str):
        given = lm.tokenizer(given, verbose=False).input_ids
    if len(given) == 1 and not isinstance(given[0], int):
        given = given[0]
    if not all(isinstance(token, int) for token in given):
        raise UserError(f"A recording is of one prompt, and {len(given)} were given; record each by itself.")
    if not given:
        raise UserError("The prompt is empty; give at least one token of text.")
    return list(given)
