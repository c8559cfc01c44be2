"""`wb.compare(lm, workload, setups)`: every setup on the same episodes, quality beside cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean, median

import pandas as pd
import torch

from workbench.cost.ffn import read_bytes, resident_bytes
from workbench.cost.metrics import BEFORE_FIRST_TOKEN, Fired, cache_bytes, fired, found_token_ns, rerouted, ttft_ns
from workbench.engine.cache import acting_layers
from workbench.engine.session import Session
from workbench.engine.setup import Method, Setup
from workbench.errors import MethodDidNotFire
from workbench.experiments.cells import Cell, Cells, cell_key
from workbench.experiments.fidelity import kl_to_dense, negative_log_likelihood, top1_agreement
from workbench.methods.base import parse_setup
from workbench.models.load import LM
from workbench.probes.energy import energy
from workbench.probes.environment import environment
from workbench.probes.memory import peak_memory
from workbench.trace.comparison import Comparison, Row
from workbench.trace.trace import Trace
from workbench.workloads.base import Answer, Episode, Workload

Given = Setup | Method | str | Iterable[Method]
Progress = Callable[[str, int, int], None]
"""Called as `(setup label, episodes done, episodes in all)`."""

Forced = tuple[tuple[int, ...], ...]
"""The tokens one episode is led along, turn by turn."""


@dataclass
class _Dense:
    """The dense run of an episode, turn by turn: the forced tokens and the logits `[n, V]` along them."""

    tokens: Forced = ()
    logits: list[torch.Tensor] = field(default_factory=list)


@dataclass
class _Sample:
    """What one setup did on one episode."""

    trace: Trace
    scores: list[float]
    nll: list[float]
    kl: list[float]
    top1: list[float]
    fired: Fired
    joules: float | None
    joules_reason: str | None
    peak_bytes: int | None
    peak_reason: str | None


def compare(
    lm: LM,
    workload: Workload,
    setups: Iterable[Given],
    *,
    out: str | Path | None = None,
    fresh: bool = False,
    on_progress: Progress | None = None,
) -> Comparison:
    """Runs every setup on every episode of a workload.

    Each episode's context is prefilled and compressed once; then each turn is appended and answered. On a branch of the
    same compressed cache the setup is led along the dense run's answer (or the workload's reference), token by token,
    to measure KL, top-1 agreement and NLL. Dense is always run, first. A warm-up is not counted.

    A decoding method is led as it decodes: a token's logits are those it would have been taken from, a draft's where the
    draft would be accepted, or the active model's. TPOT is then the time of all steps that look for tokens over the tokens
    found.

    With `out`, each setup's result is written when it is finished, and a second call takes it from there: a run that was
    killed loses the setup it was at. Several workloads and models may share the folder. A result is only taken for the
    same weights, token ids, workload, setup, forced tokens, versions and machine.

    Args:
        lm: the model.
        workload: what to run.
        setups: setups, methods, or their text form such as `h2o:budget=0.2` or `h2o:budget=0.2 + top-k:k=1`.
        out: folder to keep finished results in.
        fresh: runs everything again, replacing what is kept.
        on_progress: called after each episode.

    Raises:
        UserError: for setups that do not go together, a workload that does not fit, or a folder that cannot be written.
        MethodDidNotFire: if a method had something to do and did not do it.
    """
    chosen = [setup.ready(lm) for setup in distinct([parsed(given) for given in setups])]
    episodes = workload.episodes(lm)
    settings = {option.name: getattr(workload, option.name) for option in dataclasses.fields(workload)}
    cells = Cells(Path(out), cell_key(lm, workload.name, settings, episodes), fresh) if out is not None else None
    references = [_Dense() for _ in episodes]
    rows, traces = [], {}
    warm = False
    for setup in chosen:
        done = cells.read(setup, _forced(references)) if cells is not None else None
        if done is None:
            if not warm:
                _warm_up(lm, episodes[0])
                warm = True
            done = _cell(lm, workload, setup, episodes, references, on_progress)
            if cells is not None:
                cells.write(setup, done)
        elif on_progress is not None:
            on_progress(setup.label, len(episodes), len(episodes))
        if not any(_forced(references)):  # dense, the first, was taken from the folder
            references = [_Dense(tokens) for tokens in done.forced]
        rows.append(done.row)
        traces[setup.label] = done.trace
    about = {
        "model": lm.name,
        "workload": workload.name,
        "settings": settings,
        "layers": lm.anatomy.num_layers,
        "sliding_layers": lm.anatomy.num_layers - len(acting_layers(lm.anatomy)),
        "environment": environment(),
    }
    return Comparison(about, tuple(rows), traces)


def _forced(references: list[_Dense]) -> list[Forced]:
    return [dense.tokens for dense in references]


def _cell(
    lm: LM,
    workload: Workload,
    setup: Setup,
    episodes: list[Episode],
    references: list[_Dense],
    on_progress: Progress | None,
) -> Cell:
    """One setup on every episode. The dense run fills in `references`; what of them a killed run left is computed anew."""
    samples = []
    for episode, dense in zip(episodes, references, strict=True):
        if dense.tokens and not dense.logits:
            dense.logits = _dense_logits(lm, episode, dense.tokens)
        samples.append(_run(lm, workload, setup, episode, dense))
        if on_progress is not None:
            on_progress(setup.label, len(samples), len(episodes))
    return Cell(_row(lm, setup, episodes, samples), samples[0].trace, _forced(references))


def _dense_logits(lm: LM, episode: Episode, tokens: Forced) -> list[torch.Tensor]:
    """The dense run's logits along known tokens."""
    session = Session(lm)
    session.prefill(episode.context)
    return [_lead(session, turn.prompt, led) for turn, led in zip(episode.turns, tokens, strict=True)]


def parsed(given: Given) -> Setup:
    """A setup from whatever names one, its text form included."""
    return parse_setup(given) if isinstance(given, str) else Setup.of(given)


def distinct(setups: list[Setup]) -> list[Setup]:
    """Dense first, then every other setup once."""
    by_label = {setup.label: setup for setup in setups}
    by_label.pop("dense", None)
    return [Setup(), *by_label.values()]


def _warm_up(lm: LM, episode: Episode) -> None:
    session = Session(lm)
    session.prefill(episode.context)
    session.generate(2, stop_at_end=False)


def _run(lm: LM, workload: Workload, setup: Setup, episode: Episode, dense: _Dense) -> _Sample:
    """One episode: answered freely (which is what is measured), and led along the forced tokens on a branch."""
    session = Session(lm, setup)
    with energy(lm.device) as used, peak_memory(lm.device) as peak:
        session.prefill(episode.context)
        led = session.branch()
        generated = []
        for turn in episode.turns:
            if turn.prompt:
                session.append(turn.prompt)
            generated += session.generate(len(turn.answer), stop_at_end=False).ids
    is_dense = len(dense.tokens) < len(episode.turns)
    if is_dense:
        dense.tokens = tuple(turn.answer for turn in episode.turns) if workload.forces_reference else tuple(generated)
    logits = [_lead(led, turn.prompt, tokens) for turn, tokens in zip(episode.turns, dense.tokens, strict=True)]
    if is_dense:
        dense.logits = logits
    predicted = [tuple(each.argmax(-1).tolist()) for each in logits]
    answers = map(Answer, episode.turns, generated, predicted)
    seen, reference = torch.cat(logits), torch.cat(dense.logits)
    forced = torch.tensor([token for tokens in dense.tokens for token in tokens], device=seen.device)
    return _Sample(
        trace=session.trace,
        scores=[workload.score(lm, answer) for answer in answers],
        nll=negative_log_likelihood(seen, forced).tolist(),
        kl=kl_to_dense(reference, seen).tolist(),
        top1=top1_agreement(reference, seen).tolist(),
        fired=_check_fired(lm, setup, session.trace, len(episode.context)),
        joules=used.joules,
        joules_reason=used.reason,
        peak_bytes=peak.peak_bytes,
        peak_reason=peak.reason,
    )


def _lead(session: Session, prompt: tuple[int, ...], tokens: tuple[int, ...]) -> torch.Tensor:
    """Logits `[n, V]` before each of the forced tokens; under a decoding method those it would have taken it from."""
    if prompt:
        session.append(prompt)
    if session.setup.decoding is not None:
        return session.setup.decoding.lead(session, tokens)
    logits = []
    for token in tokens:
        logits.append(session.logits[0])
        session.step([token])
    return torch.stack(logits)


def _check_fired(lm: LM, setup: Setup, trace: Trace, prompt_tokens: int) -> Fired:
    """What the cache method did. Raises MethodDidNotFire if it left undone what it had to do."""
    may_evict = acting_layers(lm.anatomy)
    capacity = setup.cache.capacity(prompt_tokens) if setup.cache else None
    if setup.cache is None or capacity is None or capacity >= prompt_tokens:
        return fired(trace, may_evict)
    if not may_evict:
        raise MethodDidNotFire(
            f"{setup.label} has no layer to act on: all {lm.anatomy.num_layers} layers of {lm.name} are sliding-window layers, "
            "which are left alone."
        )
    at_prompt = "prefill" in setup.cache.acts
    known = at_prompt and setup.cache.joint is None  # otherwise only the trace says which layers had something to do
    shares = setup.cache.allocate(prompt_tokens, len(may_evict)) if known else None
    done = fired(trace, [layer for layer, share in zip(may_evict, shares or (), strict=known) if share < prompt_tokens])
    if (at_prompt and done.due_steps == 0) or done.steps < done.due_steps or done.layers < done.due_layers:
        raise MethodDidNotFire(
            f"{setup.label} did not do its work on {lm.name}: it brought the cache within its budget of {capacity} tokens on "
            f"{done.layers} of {done.due_layers} layers and at {done.steps} of {done.due_steps} steps where it had to."
        )
    return done


def _row(lm: LM, setup: Setup, episodes: list[Episode], samples: list[_Sample]) -> Row:
    decode = [sample.trace.table("steps").query("phase == 'decode'")["duration_ns"] for sample in samples]
    found = [found_token_ns(sample.trace) for sample in samples]
    flops = [sample.trace.flops(by="phase").set_index("phase")["flops"] for sample in samples]
    moved = [sample.trace.bytes(by="phase").set_index("phase")["bytes"] for sample in samples]
    held = [cache_bytes(sample.trace).iloc[-1] for sample in samples]
    joules = [sample.joules for sample in samples]
    peaks = [sample.peak_bytes for sample in samples]
    return Row(
        setup=setup.label,
        score=_mean(samples, "scores"),
        nll=_mean(samples, "nll"),
        kl_to_dense=_mean(samples, "kl"),
        top1_agreement=_mean(samples, "top1"),
        ttft_s=median(ttft_ns(sample.trace) for sample in samples) / 1e9,
        tpot_s=(mean(found) if None not in found else float(pd.concat(decode).median())) / 1e9,
        prefill_flops=round(mean(_before(each) for each in flops)),
        decode_flops=round(mean(each.sum() - _before(each) for each in flops)),
        decode_bytes=round(mean(each.sum() - _before(each) for each in moved)),
        kv_physical_bytes=round(mean(each["physical_bytes"] for each in held) + mean(map(_held_beside, samples))),
        kv_nominal_bytes=round(mean(each["nominal_bytes"] for each in held)),
        peak_memory_bytes=None if None in peaks else max(peaks),
        peak_memory_reason=samples[0].peak_reason,
        fired_layers=min(sample.fired.layers for sample in samples),
        layers=samples[0].fired.due_layers,
        fired_steps=sum(sample.fired.steps for sample in samples),
        steps=sum(sample.fired.due_steps for sample in samples),
        joules=None if None in joules else mean(joules),
        joules_reason=next((sample.joules_reason for sample in samples if sample.joules_reason), None),
        turn_scores=_turn_scores(samples),
        depth_scores=_depth_scores(episodes, samples),
        ffn_read_bytes=round(mean(_read_after_prefill(sample.trace) for sample in samples)),
        ffn_resident_bytes=_resident(lm, setup),
        rerouted=_rerouted(samples) if setup.routing else None,
        decoded=_decoded(samples) if setup.decoding else None,
        decoding=_figures(samples) if setup.decoding else (),
    )


def _resident(lm: LM, setup: Setup) -> int:
    own = setup.routing.resident_bytes(lm) if setup.routing else resident_bytes(lm.anatomy)
    return own + (setup.decoding.resident_bytes(lm) if setup.decoding else 0)


def _held_beside(sample: _Sample) -> int:
    """KV of another model that a decoding method runs."""
    return sample.trace.meta.get("decoding", {}).get("kv_bytes", 0)


def _decoded(samples: list[_Sample]) -> tuple[int, int]:
    counts = [sample.trace.meta["decoding"] for sample in samples]
    return sum(each["by_other"] for each in counts), sum(each["tokens"] for each in counts)


def _figures(samples: list[_Sample]) -> tuple[tuple[str, float], ...]:
    """What a decoding method says of itself, on average over samples."""
    figures = [sample.trace.meta["decoding"]["figures"] for sample in samples]
    return tuple((name, mean(each[name] for each in figures)) for name in figures[0])


def _read_after_prefill(trace: Trace) -> int:
    """FFN weights read by everything after the prefill."""
    read = read_bytes(trace)
    return int(read.loc[~read["phase"].isin(BEFORE_FIRST_TOKEN), "read_bytes"].sum())


def _rerouted(samples: list[_Sample]) -> tuple[int, int, int, int]:
    done = [rerouted(sample.trace) for sample in samples]
    layers, due = min(each.layers for each in done), max(each.due_layers for each in done)
    return layers, due, sum(each.steps for each in done), sum(each.due_steps for each in done)


def _turn_scores(samples: list[_Sample]) -> tuple[float, ...]:
    """Mean score of the 1st, 2nd, ... turn."""
    most = max(len(sample.scores) for sample in samples)
    by_turn = ([sample.scores[turn] for sample in samples if turn < len(sample.scores)] for turn in range(most))
    return tuple(mean(scores) for scores in by_turn)


def _depth_scores(episodes: list[Episode], samples: list[_Sample]) -> tuple[tuple[int, float], ...]:
    """Mean score at each depth an answer stands at."""
    at: dict[int, list[float]] = {}
    for episode, sample in zip(episodes, samples, strict=True):
        for turn, score in zip(episode.turns, sample.scores, strict=True):
            if turn.depth is not None:
                at.setdefault(turn.depth, []).append(score)
    return tuple((depth, mean(at[depth])) for depth in sorted(at))


def _before(by_phase: pd.Series) -> int:
    """What was spent before the first token."""
    return by_phase.reindex(BEFORE_FIRST_TOKEN, fill_value=0).sum()


def _mean(samples: list[_Sample], values: str) -> float:
    """Mean over every value of every sample."""
    return mean(value for sample in samples for value in getattr(sample, values))
