"""What there is to see of a run that goes on: one row a forward call, the text, and what is held. A value."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd

HISTORY = (
    "step",
    "phase",
    "setup",
    "context",
    "duration_ns",
    "kv_physical_bytes",
    "kv_nominal_bytes",
    "flops",
    "moved_bytes",
    "logprob",
    "entropy",
    "kl_to_dense",
    "agrees",
)
"""Columns of `Snapshot.history`: durations, physical bytes and quality are measured, FLOPs and moved bytes (fused) modelled."""


@dataclass(frozen=True)
class Snapshot:
    """A run at one moment. Shapes: L layers, N tokens so far, M layers with experts, E experts."""

    name: str
    model: str
    setup: str
    """The setup in force now."""
    history: pd.DataFrame = field(repr=False)
    """One row a forward call, columns `HISTORY`. Quality is null for calls of several tokens, `kl_to_dense` (nats) and
    `agrees` also where no dense run follows."""
    texts: tuple[str, ...] = field(repr=False)
    """The text of each token, by position."""
    phases: tuple[str, ...] = field(repr=False)
    """The phase each token came in."""
    held: np.ndarray = field(repr=False)
    """`[L, N]` share of a layer's kv heads that hold each token."""
    mass: np.ndarray | None = field(default=None, repr=False)
    """`[L, N]` attention of the newest observed tokens, mean over query heads and tokens; None if not observed."""
    experts: np.ndarray | None = field(default=None, repr=False)
    """`[M, E]` tokens each expert was given so far; None for a model without experts."""
    expert_layers: tuple[int, ...] = ()
    swaps: tuple[tuple[int, str], ...] = ()
    """The first step each later setup ruled, and its label."""

    @property
    def new_text(self) -> str:
        """All text after the prompt."""
        return "".join(text for text, phase in zip(self.texts, self.phases, strict=True) if phase != "prefill")
