"""Duo-LLM's questions to its patterns: what the best one for every token would give, and which tokens benefit from compute.

A pattern says which layers run the big FFN and which the small one. Each is run once over the texts, the same for all tokens,
so that a token's context is computed as the token is; what the oracle then takes is the best pattern token by token.
Alizadeh et al. 2024, arXiv 2410.10846.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch

from workbench.engine.calibration import Document
from workbench.engine.fitting import counted, next_token_losses
from workbench.engine.replacing import logits_under
from workbench.methods.routing.duo_llm import BIG, SMALL, DuoLLM, patterns
from workbench.models.load import LM


def pattern_losses(lm: LM, method: DuoLLM, texts: Sequence[Document], chosen: Sequence[str] | None = None) -> pd.DataFrame:
    """`loss[P, t]` in nats: one row a pattern, one column a token that counts; a forward call a pattern and text.

    Args:
        lm: the model.
        method: calibrated for it (`with_calibration`).
        texts: a token counts if it recalls a needle, or, in a text without needles, wherever it stands.
        chosen: patterns such as `bsbs`; None is all 2^L of big and small.
    """
    count = len(method.branches(lm))
    rows = {pattern: _losses(lm, method.with_pattern(pattern), texts) for pattern in chosen or patterns(count)}
    columns = pd.MultiIndex.from_tuples(
        [(number, place + 1) for number, text in enumerate(texts) for place in counted(text)], names=["text", "position"]
    )
    return pd.DataFrame(np.stack(list(rows.values())), index=pd.Index(rows, name="pattern"), columns=columns)


def of_size(losses: pd.DataFrame, big: int) -> pd.DataFrame:
    """The rows of patterns with so many big layers: C(L, m) of all 2^L."""
    return losses[losses.index.str.count(BIG) == big]


def oracle(losses: pd.DataFrame, big: int | None = None) -> float:
    """Mean loss if every token had its best pattern, of all or of those with so many big layers."""
    return float(_of(losses, big).min(axis=0).mean())


def fixed(losses: pd.DataFrame, big: int | None = None) -> float:
    """Mean loss of the pattern that is best for all tokens together."""
    return float(_of(losses, big).mean(axis=1).min())


def best_of_random(losses: pd.DataFrame, count: int = 100, seed: int = 0) -> float:
    """Mean loss if every token had the best of so many patterns drawn for it, with replacement."""
    drawn = np.random.default_rng(seed).integers(len(losses), size=(count, losses.shape[1]))
    return float(np.take_along_axis(losses.to_numpy(), drawn, axis=0).min(axis=0).mean())


def difficulty(losses: pd.DataFrame) -> pd.Series:
    """What each token gains by compute, nats: its loss with small FFNs alone less that of its best pattern."""
    small = losses.index[losses.index.str.count(SMALL) == losses.index.str.len()]
    return (losses.loc[small].iloc[0] - losses.min(axis=0)).rename("gap")


def summary(losses: pd.DataFrame) -> pd.DataFrame:
    """One row a number of big layers: patterns, and the mean losses of the oracle, of the best fixed one and of all."""
    rows = []
    for big in sorted(set(losses.index.str.count(BIG))):
        part = of_size(losses, big)
        each = {"oracle": oracle(part), "fixed": fixed(part), "mean": float(part.to_numpy().mean())}
        rows.append({"big": big, "patterns": len(part), **each})
    return pd.DataFrame(rows)


def _of(losses: pd.DataFrame, big: int | None) -> pd.DataFrame:
    return losses if big is None else of_size(losses, big)


def _losses(lm: LM, method: DuoLLM, texts: Sequence[Document]) -> np.ndarray:
    parts = [next_token_losses(logits_under(lm, method, text.tokens), text.tokens)[counted(text)] for text in texts]
    return torch.cat(parts).cpu().numpy()
