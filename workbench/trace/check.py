"""How well a replay foretold what live runs did: a value."""

from __future__ import annotations

import html
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd


@dataclass(frozen=True)
class CheckedPoint:
    """One method at one budget: what a replay foretold, and what a live run along the recorded tokens did."""

    method: str
    budget: float
    setup: str
    predicted_error: float
    """Mean output error of the replay."""
    live_kl: float
    """Mean KL(dense || method) of the next token along the recorded tokens, nats."""
    live_top1: float
    """Share of the recorded tokens where the likeliest token is the dense run's."""
    kept_overlap: float
    """Tokens held in both runs over tokens held in either, mean over layers, kv heads and steps; read, if it selects."""
    kept_equal: float
    """Share of layers, kv heads and steps where exactly the foretold tokens were held, or read."""


@dataclass(frozen=True)
class Check:
    """Points of a replay beside live runs. Made by `wb.check_replay`."""

    about: dict[str, Any]
    """Model, layers, prompt tokens and steps."""
    points: tuple[CheckedPoint, ...]

    @property
    def rank_correlation(self) -> float | None:
        """Spearman's rank correlation of predicted output error and live KL; None where there is no order to compare."""
        table = self.table
        ranks = table[["predicted_error", "live_kl"]].rank()
        if len(table) < 3 or (ranks.nunique() < 2).any():
            return None
        return float(ranks.corr().iloc[0, 1])

    @property
    def kept_overlap(self) -> float:
        """Mean overlap of foretold and live kept sets."""
        return float(self.table["kept_overlap"].mean())

    @property
    def table(self) -> pd.DataFrame:
        """One row a point."""
        return pd.DataFrame([asdict(point) for point in self.points])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        summary = {"rank_correlation": self.rank_correlation, "kept_overlap": self.kept_overlap}
        return {**summary, "points": [asdict(point) for point in self.points]}

    def __str__(self) -> str:
        found = self.rank_correlation
        order = "too few different points for a rank correlation" if found is None else f"rank correlation {found:+.2f}"
        return (
            f"{len(self.points)} points run live: {order} of predicted output error and live KL; "
            f"kept sets overlap by {self.kept_overlap:.1%}."
        )

    def _repr_html_(self) -> str:
        return f"<p><b>{html.escape(str(self))}</b></p>{self.table.to_html(index=False)}"
