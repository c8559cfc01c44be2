"""Methods against budgets as a map: one row a method, one column a budget, the best method on top."""

from __future__ import annotations

import re

import pandas as pd
import plotly.graph_objects as go

from workbench.errors import UserError
from workbench.plots.look import LIGHT
from workbench.plots.pareto import HIGHER_IS_BETTER, name_of
from workbench.plots.text import plain
from workbench.plots.theme import style
from workbench.trace.comparison import Comparison

_BUDGET = re.compile(r"budget=([\d.]+)(?:, )?")


def score_table(comparison: Comparison, column: str = "score") -> pd.DataFrame:
    """A quality column by method (with its knobs, without the budget) and budget; methods with the best mean come first.

    NaN where a method had nothing to do, since then the quality is not its own.

    Raises UserError for a column that is no measure of quality, and if no setup has a budget.
    """
    if column not in HIGHER_IS_BETTER:
        raise UserError(f"{column!r} is no measure of quality; choose one of {', '.join(HIGHER_IS_BETTER)}.")
    cells = {}
    for row in comparison.rows:
        found = _BUDGET.search(row.setup)
        if found:
            method = _BUDGET.sub("", row.setup).replace(", )", ")").removesuffix("()")
            cells[method, float(found[1])] = getattr(row, column) if row.steps else float("nan")
    if not cells:
        raise UserError("No setup of this comparison has a budget; compare methods such as 'snapkv:budget=0.2'.")
    table = pd.Series(cells).unstack()
    return table.loc[table.mean(axis=1).sort_values(ascending=not HIGHER_IS_BETTER[column], kind="stable").index]


def score_map(comparison: Comparison, column: str = "score") -> go.Figure:
    """The table as a map, with its numbers; the title gives the dense run's value. Raises UserError as `score_table` does."""
    table = score_table(comparison, column).iloc[::-1]
    dense = next((getattr(row, column) for row in comparison.rows if row.setup == "dense"), None)
    better = HIGHER_IS_BETTER[column]
    figure = go.Figure(
        go.Heatmap(
            z=table.to_numpy(),
            x=[f"{budget:g}" for budget in table.columns],
            y=list(map(plain, table.index)),
            text=table.map(lambda value: "idle" if value != value else f"{value:.2f}").to_numpy(),
            texttemplate="%{text}",
            textfont={"color": LIGHT.ink},
            colorscale=[[0.0, LIGHT.low], [1.0, LIGHT.high_under_text]],
            reversescale=not better,
            zmin=0,
            zmax=1 if column in {"score", "top1_agreement"} else None,
            showscale=False,
            hovertemplate="%{y} at %{x}<br>" + name_of(column) + " %{z:.3f}<extra></extra>",
        )
    )
    about = comparison.about
    beside = "" if dense is None else f" (dense {dense:.2f})"
    title = f"{name_of(column)}: {plain(about['workload'])} on {plain(about['model'])}{beside}"
    figure = style(figure, title, "budget (share of the prompt)", "", height=110 + 24 * len(table))
    return figure.update_xaxes(type="category").update_yaxes(type="category", automargin=True)
