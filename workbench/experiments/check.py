"""`wb.check_replay(lm, recording, replay)`: a few points of a replay beside live runs along the same tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch

from workbench.engine.cache import EngineLayer
from workbench.engine.session import Session
from workbench.errors import UserError
from workbench.experiments.fidelity import kl_to_dense, top1_agreement
from workbench.methods.base import Method, parse_method
from workbench.models.load import LM
from workbench.trace.check import Check, CheckedPoint
from workbench.trace.recording import Recording
from workbench.trace.replay import Point, Replay

_SAME_KEYS = 0.05
"""Most a key may be off, as a share of the largest, for the recording to be of this model: kernels and devices round."""


def check_replay(
    lm: LM,
    recording: Recording,
    replay: Replay,
    *,
    points: int = 6,
    on_progress: Callable[[str, int, int], None] | None = None,
) -> Check:
    """Runs a few points of a replay live on the recorded prompt, led along the recorded tokens.

    The points are spread evenly over the ranks of the predicted output error, the best and the worst included.

    Args:
        lm: the model that was recorded.
        recording: what was replayed.
        replay: its replay.
        points: how many points to run; each takes about as long as the recording did.
        on_progress: called as `(setup label, points done, points in all)`.

    Raises:
        UserError: for fewer than one point, another recording, or another model.
    """
    if points < 1:
        raise UserError(f"Cannot check {points} points of a replay; ask for 1 or more.")
    if (recording.prompt_tokens, recording.steps) != (replay.about["prompt_tokens"], replay.about["steps"]):
        raise UserError(f"{replay!r} is not of {recording!r}; replay this recording first.")
    tokens = recording.trace.table("tokens").sort_values("position")["id"].tolist()
    dense, _ = _run(lm, None, recording, tokens)
    checked = []
    chosen = _spread(replay.points, points)
    for number, point in enumerate(chosen, 1):
        logits, read = _run(lm, _method(point), recording, tokens)
        overlaps = [_overlap(replay, point, read, step) for step in range(recording.steps)]
        checked.append(
            CheckedPoint(
                method=point.method,
                budget=point.budget,
                setup=point.setup,
                predicted_error=float(point.output_error.mean()),
                live_kl=float(kl_to_dense(dense, logits).mean()),
                live_top1=float(top1_agreement(dense, logits).mean()),
                kept_overlap=float(np.mean(overlaps)),
                kept_equal=float(np.mean(np.array(overlaps) == 1)),
            )
        )
        if on_progress is not None:
            on_progress("live runs", number, len(chosen))
    return Check(replay.about, tuple(checked))


def _spread(points: tuple[Point, ...], count: int) -> list[Point]:
    """`count` of the points, evenly spaced in the order of their predicted error."""
    ordered = sorted(points, key=lambda point: float(point.output_error.mean()))
    places = np.linspace(0, len(ordered) - 1, min(count, len(ordered))).round().astype(int)
    return [ordered[place] for place in places]


def _method(point: Point) -> Method:
    """The method a point's label names."""
    name, _, knobs = point.setup.partition("(")
    return parse_method(f"{name}:{knobs.removesuffix(')').replace(', ', ',')}")


def _run(lm: LM, method: Method | None, recording: Recording, tokens: list[int]) -> tuple[torch.Tensor, list[list[np.ndarray]]]:
    """Logits `[S, V]` after each recorded token, and `[layer][step]` the positions `[H, C]` read while it was decoded.

    Positions are -1 where a head reads fewer tokens than others; the token being decoded may be missing.
    """
    session = Session(lm, method)
    session.prefill(tokens[: recording.prompt_tokens])
    layers = [session._cache.layers[layer.layer] for layer in recording.layers]
    if method is None:
        _check_same_model(lm, recording, layers)
    logits: list[torch.Tensor] = []
    read: list[list[np.ndarray]] = [[] for _ in layers]
    for token in tokens[recording.prompt_tokens :]:
        held = [layer.store.positions[0].cpu().numpy().copy() for layer in layers]
        logits.append(session.step([token])[0])
        for seen, layer, positions in zip(read, layers, held, strict=True):
            chosen = layer.selected  # by query heads, if each has its own; those of a kv head follow each other
            seen.append(positions if chosen is None else chosen[0].reshape(len(positions), -1).cpu().numpy())
    return torch.stack(logits), read


def _check_same_model(lm: LM, recording: Recording, layers: list[EngineLayer]) -> None:
    """Raises UserError if the dense run's keys are not those recorded."""
    message = f"The recording is not of {lm.name}: its keys differ; give the model that was recorded."
    for layer, recorded in zip(layers, recording.layers, strict=True):
        keys = layer.store.keys[0]
        there = recorded.keys[:, : recording.prompt_tokens].to(keys.device)
        if there.shape != keys.shape or (there - keys).abs().max() > _SAME_KEYS * keys.abs().max():
            raise UserError(message)


def _overlap(replay: Replay, point: Point, read: list[list[np.ndarray]], step: int) -> list[float]:
    """How much foretold and live sets share, by layer and head. The token being decoded, read by both, is left out.

    These are the sets kept, or of methods that select, those read.
    """
    position = replay.about["prompt_tokens"] + step
    shares = []
    for layer, live in zip(replay.about["layers"], read, strict=True):
        for foretold, positions in zip(replay.read(point.setup, point.budget, layer, step), live[step], strict=True):
            one, other = set(foretold.tolist()) - {position}, set(positions.tolist()) - {-1, position}
            shares.append(len(one & other) / max(1, len(one | other)))
    return shares
