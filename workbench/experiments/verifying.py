"""What verifying several tokens at once really costs a model, beside what MoESD (arXiv 2505.19645) predicts of it.

The true continuation of a text is read in chunks of 1 to gamma + 1 tokens a row, as a model does that verifies drafts of which
all are right. Experts hit are counted in one observed pass; seconds are those of bare passes, the sizes taking turns.
"""

from __future__ import annotations

import copy
import time
from pathlib import Path
from statistics import median

import numpy as np
import pandas as pd
import torch
from transformers import DynamicCache

from workbench.cost.hardware import Hardware
from workbench.cost.verification import seen_beside_expected, step_seconds, target_efficiency
from workbench.errors import UserError
from workbench.models.load import LM
from workbench.probes.profiler import profile
from workbench.workloads.plain_text import prompt_tokens


@torch.no_grad()
def verifying(
    lm: LM,
    gamma: int = 4,
    *,
    batch: int = 1,
    context: int = 256,
    rounds: int = 4,
    passes: int = 5,
    hardware: str | Path | Hardware | None = None,
) -> pd.DataFrame:
    """Experts hit and seconds of a step by how many tokens of each row are in flight.

    Args:
        lm: a mixture of experts.
        gamma: drafted tokens a row; steps of 1 to `gamma + 1` tokens are run.
        batch: rows, each a text of its own.
        context: tokens of each row read before.
        rounds: steps of the largest size; smaller ones read the same text in more steps.
        passes: how often each size is timed, in turns.
        hardware: a sheet to predict the target efficiency for, too.

    Returns:
        One row a number of tokens a row: `tokens_a_row, tokens` (in flight); means over steps and layers `measured_unique,
        predicted_unique, measured_load, predicted_load`; `measured_step_s`, the median, and `measured_spread_s` between its
        quartiles; `measured_target_efficiency`, the step of one token over this one; and `predicted_target_efficiency`, of
        bytes read. With hardware also `predicted_step_s` and `predicted_target_efficiency_on_sheet`.

    Raises:
        UserError: for a dense model, and for sizes that are none.
    """
    anatomy = lm.anatomy
    if all(layer.experts is None for layer in anatomy.layers):
        raise UserError(f"{lm.name} has no experts that can be seen, so there is nothing to count; give a mixture of experts.")
    for name, value in (("gamma", gamma), ("batch", batch), ("context", context), ("rounds", rounds), ("passes", passes)):
        if value < 1:
            raise UserError(f"{name} cannot be {value}; give 1 or more.")
    sizes = list(range(1, gamma + 2))
    length = context + rounds * (gamma + 1)
    text = torch.tensor([prompt_tokens(lm, length, seed=row) for row in range(batch)], device=lm.device)
    prefilled = DynamicCache(config=lm.model.config)
    lm.model(text[:, :context], past_key_values=prefilled)
    with profile(lm.model) as prof:
        for size in sizes:
            _read(lm, text, context, prefilled, size)
    seen = seen_beside_expected(prof.trace).groupby("tokens")[[*_COUNTS]].mean()
    seconds: dict[int, list[float]] = {size: [] for size in sizes}
    for number in range(passes + 1):
        for size in sizes if number % 2 else reversed(sizes):
            taken = _read(lm, text, context, prefilled, size)
            seconds[size] += taken if number else []  # the first pass warms up
    rows = []
    for size in sizes:
        row = {"tokens_a_row": size, "tokens": batch * size, **seen.loc[batch * size]}
        low, high = np.quantile(seconds[size], [0.25, 0.75])
        row |= {"measured_step_s": median(seconds[size]), "measured_spread_s": float(high - low)}
        row["measured_target_efficiency"] = median(seconds[1]) / median(seconds[size])
        run = {"batch": batch, "context": context}
        row["predicted_target_efficiency"] = 1.0 if size == 1 else target_efficiency(anatomy, size - 1, **run)
        if hardware is not None:
            row["predicted_step_s"] = step_seconds(anatomy, size, hardware, **run)
            one = step_seconds(anatomy, 1, hardware, **run)
            row["predicted_target_efficiency_on_sheet"] = one / row["predicted_step_s"]
        rows.append(row)
    return pd.DataFrame(rows)


_COUNTS = ("measured_unique", "predicted_unique", "measured_load", "predicted_load")


def _read(lm: LM, text: torch.Tensor, context: int, prefilled: DynamicCache, size: int) -> list[float]:
    """Reads the text after the context in steps of so many tokens a row, what is left over apart; the seconds of each."""
    cache = copy.deepcopy(prefilled)
    seconds = []
    for start in range(context, text.shape[1] - size + 1, size):
        started = time.perf_counter()
        lm.model(text[:, start : start + size], past_key_values=cache)
        if lm.device.type == "cuda":
            torch.cuda.synchronize(lm.device)
        seconds.append(time.perf_counter() - started)
    return seconds
