"""Quality against cost: one point a setup, setups of one method joined, the best trade-offs on a line."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from workbench.errors import UserError
from workbench.plots.text import plain
from workbench.plots.theme import MARK, method_colours, method_of, method_symbol, style
from workbench.trace.comparison import Comparison

HIGHER_IS_BETTER = {"score": True, "top1_agreement": True, "kl_to_dense": False, "nll": False}
"""Columns that measure quality."""


def pareto(comparison: Comparison, x: str = "kv_physical_bytes", y: str = "score") -> go.Figure:
    """Scatter of a quality column over a cost column. Raises UserError if a column has no numbers."""
    table = comparison.table
    for column in (x, y):
        if column not in table or not pd.api.types.is_numeric_dtype(table[column]):
            numeric = table.select_dtypes("number").columns
            raise UserError(f"Cannot draw {column!r}; columns with numbers here are {', '.join(numeric)}.")
    colours = method_colours(list(table["setup"]))
    figure = go.Figure()
    for method, rows in table.groupby(table["setup"].map(method_of), sort=False):
        rows = rows.sort_values(x)
        figure.add_scatter(
            x=rows[x],
            y=rows[y],
            mode="lines+markers",
            name=plain(method),
            line={"dash": "dot", "width": 1, "color": colours[rows["setup"].iloc[0]]},
            marker={"size": 12, "symbol": method_symbol(str(method))},
            customdata=rows[["setup", "fired"]].map(plain),
            hovertemplate=f"%{{customdata[0]}}<br>{x} %{{x:,}}<br>{y} %{{y:.3f}}<br>%{{customdata[1]}}<extra></extra>",
        )
    front = frontier(table, x, y)
    figure.add_scatter(x=front[x], y=front[y], mode="lines", name="best trade-offs", line={"width": 2, "color": MARK})
    about = comparison.about
    title = f"{name_of(y)} against {name_of(x)}<br><sub>{plain(about['workload'])} on {plain(about['model'])}</sub>"
    return style(figure, title, _axis(x), _axis(y), height=430)


def frontier(table: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The rows no other row beats in both columns, in order of cost."""
    sign = 1 if HIGHER_IS_BETTER.get(y, True) else -1
    best, kept = float("-inf"), []
    for index, row in table.assign(quality=sign * table[y]).sort_values([x, "quality"], ascending=[True, False]).iterrows():
        if row["quality"] > best:
            best = row["quality"]
            kept.append(index)
    return table.loc[kept]


def _axis(column: str) -> str:
    names = {
        "kv_physical_bytes": "KV cache really allocated (bytes)",
        "kv_nominal_bytes": "KV cache by budget (bytes)",
        "score": "score (share right)",
        "kl_to_dense": "KL to dense (nats a token)",
        "nll": "negative log-likelihood (nats a token)",
        "top1_agreement": "top-1 as in the dense run (share)",
        "tpot_s": "time per output token (s, measured)",
        "ttft_s": "time to first token (s, measured)",
    }
    return names.get(column, column)


def name_of(column: str) -> str:
    """A column's name without its unit."""
    return _axis(column).partition(" (")[0]
