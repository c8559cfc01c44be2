"""`wb.calibrate(lm, method)`: what a method has to know about a model beforehand, found by dense runs over texts and kept.

`python -m workbench.experiments.calibrate` makes the calibrations anew that come with the built-in models.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from workbench.engine.cache import acting_layers
from workbench.engine.calibration import Calibration, Document, Needle, Sample, calibration_file, find, shipped_file
from workbench.engine.policy import ROTATION, LayerState
from workbench.engine.session import Session
from workbench.errors import UserError
from workbench.experiments import blocks
from workbench.methods.base import METHODS, Method, parse_method
from workbench.methods.routing.base import RoutingMethod
from workbench.methods.routing.trained import TrainedBlock
from workbench.models.anatomy import output_projections
from workbench.models.fingerprint import fingerprint
from workbench.models.load import LM, builtin_names, load
from workbench.probes.attention import AttentionProbe
from workbench.probes.queries import QueryProbe
from workbench.probes.rotation import rotations
from workbench.trace.recording import LayerTensors
from workbench.workloads.base import Episode
from workbench.workloads.plain_text import other_tokens
from workbench.workloads.recall_facts import Recall

TEXTS, CONTEXT, SEED = 8, 512, 977
"""The recall documents a calibration runs over, by default: how many, tokens of each, and a seed no workload starts with."""

Progress = Callable[[str, int, int], None]


def calibrate(
    lm: LM,
    method: Method | str,
    *,
    documents: Sequence[Document] | None = None,
    on_progress: Progress | None = None,
) -> Calibration:
    """Calibrates a method for a model and keeps the result in the user's cache directory, where every session finds it.

    Args:
        lm: the model.
        method: a method that needs it, or its text form such as `compress-kv`; knobs the calibration depends on count.
        documents: texts to learn from; by default eight documents of 512 tokens (fewer if the model has no room), in which
            facts are hidden in prose and recalled at the end; half of them plain prose for a method that says so,
            and hundreds of both for a block that is trained.
        on_progress: called with a label, and texts (of a training, steps) done and in all.

    Raises:
        UserError: for a method that needs no calibration, or texts that do not fit the model.
    """
    chosen = parse_method(method) if isinstance(method, str) else method
    model = fingerprint(lm)
    if chosen.calibrated_by is None:
        needing = ", ".join(map(_title, _to_calibrate(lm)))
        raise UserError(f"{chosen.label!r} needs no calibration; those that do are {needing}.")
    if model is None:
        raise UserError(f"Some weights of {lm.name} are not in memory, so a calibration of it could not be found again.")
    path = calibration_file(model, chosen)
    _check_writable(path.parent)
    found = _found(lm, chosen, model, documents, on_progress)
    found.save(path)
    return found


def ship(name: str) -> list[Path]:
    """Calibrates every method, with its default knobs, for a built-in model, and keeps that beside the model."""
    lm = load(name, device="cpu")
    methods = _to_calibrate(lm)
    return [_found(lm, method, fingerprint(lm), None, None).save(shipped_file(name, method)) for method in methods]


def _found(
    lm: LM, method: Method, model: str, documents: Sequence[Document] | None, on_progress: Progress | None
) -> Calibration:
    texts = _documents(lm, method) if documents is None else tuple(documents)
    if not texts:
        raise UserError("There is no text to calibrate with; give at least one document, or leave documents out.")
    if isinstance(method, RoutingMethod):
        method.check(lm.anatomy)
    layers = tuple(_acting(lm)) if method.slot == "cache" else ()
    started = time.monotonic()
    with torch.no_grad():
        tables = method.calibrate(_Samples(lm, method, texts, on_progress))
    about = {
        "model": lm.name,
        "texts": method.calibrated_on if documents is None else "given",
        "documents": len(texts),
        "tokens": sum(len(text.tokens) for text in texts),
    }
    tables = {name: table.detach().cpu() for name, table in tables.items()}
    found = Calibration(method.name, method.calibration_knobs(), model, layers, about, tables)
    if documents is not None or not isinstance(method, TrainedBlock):
        return found
    seconds = round(time.monotonic() - started, 1)
    held_out = blocks.rows_of(lm, held_out=True)
    reached = {"seconds": seconds, **blocks.reached(lm, method.with_calibration(found), held_out)}
    return dataclasses.replace(found, about={**about, "reached": reached})


def calibrations(lm: LM) -> dict[str, Calibration | None]:
    """What can be calibrated, methods with their default knobs in their text form, and what there is of it for a model."""
    model = fingerprint(lm)
    return {_title(method): find(model, method) if model else None for method in _to_calibrate(lm)}


def _to_calibrate(lm: LM) -> list[Method]:
    """What can be calibrated for a model: methods it is of the right make for."""
    return [method for cls in METHODS.values() for method in cls.to_calibrate() if _serves(method, lm)]


def _serves(method: Method, lm: LM) -> bool:
    """Whether a method takes a model of this make; cache methods take any."""
    try:
        if isinstance(method, RoutingMethod):
            method.check(lm.anatomy)
    except UserError:
        return False
    return True


def _title(method: Method) -> str:
    """The method's name, with those of its calibration's knobs that are not at their defaults, as the command line takes it."""
    usual = type(method)().calibration_knobs()
    knobs = [f"{name}={value}" for name, value in method.calibration_knobs().items() if value != usual[name]]
    return f"{method.name}:{','.join(knobs)}" if knobs else method.name


def _documents(lm: LM, method: Method) -> tuple[Document, ...]:
    """What a method learns from if nothing was given; for a block that is trained hundreds of them."""
    if isinstance(method, TrainedBlock):
        return blocks.documents(blocks.rows_of(lm), method.steps)
    if method.calibrated_on == "recall":
        return recall_documents(lm, TEXTS)
    return (*recall_documents(lm, TEXTS // 2), *prose_documents(lm, TEXTS // 2))


def prose_documents(lm: LM, texts: int, *, context: int = CONTEXT, seed: int = SEED) -> tuple[Document, ...]:
    """Prose that no workload shows, in which every token counts."""
    length = min(context, lm.anatomy.max_positions or context)
    tokens = [other_tokens(lm, length, seed=seed + 7 * number) for number in range(texts)]
    return tuple(Document(each, length) for each in tokens)


def recall_documents(lm: LM, texts: int, *, context: int = CONTEXT, seed: int = SEED) -> tuple[Document, ...]:
    """Documents whose facts are asked for and answered at the end; a needle is a fact's value, where it was stated."""
    facts = Recall.facts
    room = lm.anatomy.max_positions
    if room is not None:
        context = min(context, room - 16 * facts)
    episodes = Recall(context=context, samples=texts, seed=seed, facts=facts).episodes(lm)
    return tuple(map(_document, episodes))


def _document(episode: Episode) -> Document:
    tokens = list(episode.context)
    needles = []
    for turn in episode.turns:
        tokens += turn.prompt
        start = _find(episode.context, turn.answer)
        if start is not None:
            asking = range(len(tokens) - 1, len(tokens) - 1 + len(turn.answer))
            needles.append(Needle(start, start + len(turn.answer), tuple(asking)))
        tokens += turn.answer
    return Document(tuple(tokens), len(episode.context), tuple(needles))


def _find(tokens: Sequence[int], part: Sequence[int]) -> int | None:
    """Where a part begins; a tokenizer may have cut it differently there."""
    size = len(part)
    return next((i for i in range(len(tokens) - size + 1) if tuple(tokens[i : i + size]) == tuple(part)), None)


@dataclass(frozen=True)
class _Samples:
    """The samples of some texts, made anew each time they are gone through, so that one at a time is in memory."""

    lm: LM
    method: Method
    documents: tuple[Document, ...]
    on_progress: Progress | None

    def __iter__(self) -> Iterator[Sample]:
        for done, text in enumerate(self.documents, 1):
            yield observed(self.lm, text, ROTATION in getattr(self.method, "needs", ()))
            self.advance(done, len(self.documents), "texts")

    def advance(self, done: int, total: int, what: str = "steps") -> None:
        """Hands on how much is done."""
        if self.on_progress is not None:
            self.on_progress(f"{self.method.name}: {what}", done, total)


def observed(lm: LM, document: Document, with_rotation: bool = False) -> Sample:
    """Runs a document through a model, densely and in one call. Raises UserError if there is no layer to observe."""
    layers = _acting(lm)
    session = Session(lm)
    taken = QueryProbe(layers, len(document.tokens))
    probe = AttentionProbe(lm.model, taken)
    try:
        probe.attach()
        session.prefill(list(document.tokens))
    finally:
        probe.detach()
    turned = rotations(lm.model, layers) if with_rotation else {}
    states = []
    for index in layers:
        store = session._cache.layers[index].store
        tensors = taken.layer(index, store.keys[0], store.values[0])
        states.append(_state(tensors, lm.anatomy.num_layers, turned.get(index)))
    every = output_projections(lm.model)
    missing = [index for index in layers if every[index] is None]
    if missing:
        raise UserError(f"The output projection of layer {missing[0]} of {lm.name} was not found; choose another method.")
    return Sample(document, tuple(states), tuple(every[index] for index in layers))


def _acting(lm: LM) -> list[int]:
    layers = acting_layers(lm.anatomy)
    if not layers:
        raise UserError(f"Every layer of {lm.name} has a sliding window, which no cache method touches.")
    return layers


def _state(tensors: LayerTensors, num_layers: int, rotation) -> LayerState:
    num_heads, length, _ = tensors.keys.shape
    device = tensors.keys.device
    return LayerState(
        keys=tensors.keys[None],
        values=tensors.values[None],
        positions=torch.arange(length, dtype=torch.int32, device=device).expand(1, num_heads, length),
        capacity=torch.tensor([length], device=device),
        scaling=tensors.scaling,
        layer=tensors.layer,
        num_layers=num_layers,
        phase="prefill",
        queries=tensors.queries[None],
        mass=tensors.prompt_mass[None],
        rotation=rotation,
    )


def _check_writable(directory: Path) -> None:
    """Raises UserError before a long run if its result could not be kept."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        probe = directory / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"Cannot write to {directory} ({error.strerror}); set WORKBENCH_CACHE to another folder.") from None


if __name__ == "__main__":
    for builtin in builtin_names():
        for path in ship(builtin):
            print(path)
