"""Quality beside the FFN weights read a token, with one row of text in flight or several.

A decode step reads each expert that any of its rows is given once, so what a routing method saves depends on how many tokens
are in flight: a batch of rows, as a server has it, or the tokens a draft proposes. `wb.compare` runs one row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import pandas as pd
import torch

from workbench.cost.ffn import read_bytes, resident_bytes
from workbench.engine.session import Session
from workbench.engine.setup import Setup
from workbench.errors import UserError
from workbench.experiments.compare import Given, distinct, parsed
from workbench.experiments.fidelity import kl_to_dense, negative_log_likelihood
from workbench.models.load import LM
from workbench.trace.trace import Trace
from workbench.workloads.plain_text import prompt_tokens

Progress = Callable[[str, int, int], None]
"""Called as `(setup label, rows in flight done, in all)`."""


def quality_in_flight(
    lm: LM,
    setups: Iterable[Given],
    rows: Sequence[int] = (1, 8),
    *,
    context: int = 128,
    tokens: int = 48,
    texts: int = 8,
    seed: int = 0,
    on_progress: Progress | None = None,
) -> pd.DataFrame:
    """Leads every setup along the same prose, so many rows of it at a time, and dense first.

    Args:
        lm: the model.
        setups: as for `wb.compare`.
        rows: rows in flight; each number has to divide `texts`.
        context: tokens of the prompt.
        tokens: tokens it is led along after that, one a row and step.
        texts: how many texts, the same for each number of rows.
        seed: which texts.
        on_progress: called after each setup and number of rows.

    Returns:
        One row a setup and number of rows: `nll` and `kl_to_dense` (nats a token, measured), `read_bytes` (FFN weights read in
        decode steps, a token; modelled), `resident_bytes`, and `changed` (share of tokens and layers where a routing method
        computed something else).

    Raises:
        UserError: for setups the model cannot run, and numbers of rows that do not divide the texts.
    """
    uneven = [count for count in rows if count < 1 or texts % count]
    if uneven or not rows:
        raise UserError(
            f"{texts} texts cannot be run {uneven[0] if uneven else 'no'} at a time; give a number that divides them."
        )
    episodes = [prompt_tokens(lm, context + tokens, seed=1000 * seed + number) for number in range(texts)]
    chosen = [setup.ready(lm) for setup in distinct([parsed(given) for given in setups])]
    found, dense = [], {}
    for setup in chosen:
        for done, count in enumerate(rows, 1):
            groups = [episodes[start : start + count] for start in range(0, texts, count)]
            runs = [_led(lm, setup, group, context) for group in groups]
            logits = torch.cat([logits for logits, _ in runs])
            dense.setdefault(count, logits)
            truth = torch.tensor([row[context:] for row in episodes], device=logits.device).flatten()
            found.append(
                {
                    "setup": setup.label,
                    "rows": count,
                    "nll": negative_log_likelihood(logits, truth).mean().item(),
                    "kl_to_dense": kl_to_dense(dense[count], logits).mean().item(),
                    "read_bytes": sum(_read(trace) for _, trace in runs) / (texts * tokens),
                    "resident_bytes": setup.routing.resident_bytes(lm) if setup.routing else resident_bytes(lm.anatomy),
                    "changed": sum(_changed(trace) for _, trace in runs) / len(runs),
                }
            )
            if on_progress is not None:
                on_progress(setup.label, done, len(rows))
    return pd.DataFrame(found)


def _led(lm: LM, setup: Setup, group: Sequence[tuple[int, ...]], context: int) -> tuple[torch.Tensor, Trace]:
    """Logits before each token after the context, row by row `[rows x tokens, V]`, and the trace."""
    session = Session(lm, setup)
    session.prefill([list(row[:context]) for row in group])
    logits = []
    for step in range(context, len(group[0])):
        logits.append(session.logits)
        session.step([row[step] for row in group])
    return torch.stack(logits, dim=1).flatten(0, 1), session.trace


def _read(trace: Trace) -> int:
    """FFN weights read in decode steps."""
    read = read_bytes(trace)
    return int(read.loc[read["phase"] == "decode", "read_bytes"].sum())


def _changed(trace: Trace) -> float:
    """Share of tokens and layers of decode steps, of those a routing method saw, where it changed what is computed."""
    steps = trace.table("steps").query("phase == 'decode'")[["step", "tokens"]]
    work = trace.table("work").query("component != 'method'").merge(steps, on="step")
    return work["changed"].sum() / work["tokens"].sum() if len(work) else 0.0
