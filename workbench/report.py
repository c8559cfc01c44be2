"""The report: one HTML file that opens offline, with the table, the trade-offs and what each method kept."""

from __future__ import annotations

import html
import os
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from plotly.offline import get_plotlyjs

from workbench import plots
from workbench.errors import UserError
from workbench.plots.cache_map import kept_share
from workbench.plots.theme import human_bytes
from workbench.trace.check import Check
from workbench.trace.comparison import Comparison, Row
from workbench.trace.replay import Replay
from workbench.trace.trace import Trace

_STYLE = """
body{font:15px/1.5 Inter,Helvetica,Arial,sans-serif;color:#1b1b1b;max-width:1400px;margin:2rem auto;padding:0 1rem}
h1{font-size:1.6rem;margin-bottom:.2rem} h2{font-size:1.2rem;margin-top:2.2rem} .sub{color:#666;margin-top:0}
.tokens{font:12.5px/1.75 ui-monospace,Menlo,Consolas,monospace;white-space:pre-wrap;word-break:break-word;
border:1px solid #e4e4e4;border-radius:6px;padding:.7rem;max-height:22rem;overflow-y:auto}
.tokens span{border-radius:2px} .note{color:#666;font-size:13px}
"""

_TABLE_STYLE = """
.wb-table{overflow-x:auto} .wb-table table{border-collapse:collapse;font-size:13px}
.wb-table td,.wb-table th{padding:.35rem .5rem;text-align:right;border-bottom:1px solid #8884;white-space:nowrap}
.wb-table td:first-child,.wb-table th:first-child{text-align:left}
.wb-table tr.group th{opacity:.6;text-align:center;border:0}
"""
"""Travels with the table, which is shown in reports, notebooks and dashboards, light and dark."""

_COLUMNS: tuple[tuple[str, str, str], ...] = (
    ("measured", "score", "score"),
    ("measured", "KL", "kl_to_dense"),
    ("measured", "top-1", "top1_agreement"),
    ("measured", "NLL", "nll"),
    ("measured", "fired on", "fired"),
    ("measured", "TTFT", "ttft_s"),
    ("measured", "TPOT", "tpot_s"),
    ("measured", "KV held", "kv_physical_bytes"),
    ("measured", "FFN held", "ffn_resident_bytes"),
    ("measured", "peak memory", "peak_memory_bytes"),
    ("measured", "energy", "joules"),
    ("modelled", "KV by budget", "kv_nominal_bytes"),
    ("modelled", "prefill FLOPs", "prefill_flops"),
    ("modelled", "decode FLOPs", "decode_flops"),
    ("modelled", "decode bytes", "decode_bytes"),
    ("modelled", "FFN read", "ffn_read_bytes"),
)
"""Group, heading and attribute of each column. Measured and modelled numbers never share one."""


def write_report(comparison: Comparison, path: Path) -> Path:
    """Writes the report. Raises UserError if the file cannot be written; nothing half-written stays."""
    return _write(report_html(comparison), path)


def write_contexts_report(comparisons: Sequence[Comparison], path: Path) -> Path:
    """The same for comparisons on contexts of several lengths, whose own reports lie beside it, by context."""
    return _write(contexts_html(comparisons), path)


def write_replay_report(replay: Replay, check: Check | None, path: Path) -> Path:
    """The same for a replay: its curves, with the points that were run live, and the numbers."""
    return _write(replay_html(replay, check), path)


def _write(page: str, path: Path) -> Path:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8")
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"Cannot write the report to {path} ({error.strerror}); choose another path.") from None
    return path


def report_html(comparison: Comparison) -> str:
    """The whole page."""
    about = comparison.about
    title = f"{about['workload']} on {about['model']}"
    kept = "".join(_kept(label, trace) for label, trace in comparison.traces.items() if trace.arrow("evictions").num_rows)
    return f"""{_head(title)}
<p class="sub">{html.escape(comparison.settings)} &middot; {html.escape(_ran_on(about["environment"]))}</p>
<h2>Quality beside cost</h2>
{table_html(comparison)}
<p class="note">KL: KL(dense || setup) in nats a token; top-1: share of tokens where the likeliest is the dense run's.
Fired: the layers and steps where the method acted, of those where it had to. Times are medians. KV held: memory allocated
for the cache at the end of a sample, spare room and the method's own state included. Peak memory: of the process on a CPU, of
allocated tensors on a GPU. FLOPs and bytes are of one sample,
over the prefill or everything after it; FLOPs count matrix products, a multiply-add as 2, causal attention as T x T; bytes
follow the fused model.</p>
{_left_alone(about)}
{_by_turn(comparison)}{_by_depth(comparison)}
<h2>Trade-offs</h2>
{_figure(comparison.pareto())}
{_figure(comparison.pareto(y="kl_to_dense"))}
<h2>KV cache over a run</h2>
<p class="note">The first sample. A forward call is the prefill, an appended question, or one decoded token.</p>
{_figure(plots.kv_bytes(comparison.traces))}
<h2>What each method kept</h2>
<p class="note">The first sample, at its end. Darker: held by more layers and kv heads. Hover for the token's share.</p>
{kept or "<p>No method evicted anything.</p>"}
</body></html>
"""


def contexts_html(comparisons: Sequence[Comparison]) -> str:
    """The whole page of comparisons that differ in the length of their contexts: scores side by side, then each by itself."""
    first = comparisons[0].about
    by_context = {f"{each.about['settings']['context']} tokens": each for each in comparisons}
    sections = "".join(
        f'<h2>{name}</h2><p class="note">{html.escape(each.settings)}; more in '
        f'<a href="context-{each.about["settings"]["context"]}/report.html">its own report</a>.</p>'
        f"{table_html(each)}{_figure(each.pareto())}"
        for name, each in by_context.items()
    )
    return f"""{_head(f"{first['workload']} on {first['model']}, by context")}
<p class="sub">{html.escape(_ran_on(first["environment"]))}</p>
<h2>Score by context</h2>
{_by_context(by_context, "score")}
<h2>KL to dense by context</h2>
<p class="note">Nats a token.</p>
{_by_context(by_context, "kl_to_dense")}
{_left_alone(first)}
{sections}
</body></html>
"""


def _by_context(comparisons: dict[str, Comparison], column: str) -> str:
    """One row a setup, one column a context."""
    values = {name: {row.setup: getattr(row, column) for row in each.rows} for name, each in comparisons.items()}
    return _frame(pd.DataFrame(values).rename_axis("setup").reset_index())


def replay_html(replay: Replay, check: Check | None) -> str:
    """A replay's whole page."""
    live = "" if check is None else f"<h2>Run live</h2><p>{html.escape(str(check))}</p>{_frame(check.table)}"
    return f"""{_head(f"Replay of {replay.about['model']}")}
<p class="sub">{html.escape(repr(replay))}</p>
{_figure(plots.replay_curves(replay, check))}
{_figure(plots.replay_curves(replay, check, "output_error"))}
<p class="note">What each method would have kept of one recorded dense run. Mass retained: share of the decoded tokens'
attention on what was read. Output error: distance of a head's output from the dense one, as a share of its length. Means
over layers, heads and steps. Best possible: the most mass any set of that size retains.</p>
{live}
<h2>Numbers</h2>
{_frame(replay.curves())}
</body></html>
"""


def _head(title: str) -> str:
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Workbench: {html.escape(title)}</title><style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>
<h1>{html.escape(title)}</h1>"""


def _frame(table: pd.DataFrame) -> str:
    shown = table.to_html(index=False, border=0, float_format="{:.4g}".format)
    return f'<style>{_TABLE_STYLE}</style><div class="wb-table">{shown}</div>'


def table_html(comparison: Comparison) -> str:
    """The comparison's rows as an HTML table; measured and modelled columns stand apart."""
    groups = list(dict.fromkeys(group for group, _, _ in _COLUMNS))
    spans = {group: sum(each == group for each, _, _ in _COLUMNS) for group in groups}
    head = "".join(f'<th colspan="{spans[group]}">{group}</th>' for group in groups)
    names = "".join(f"<th>{name}</th>" for _, name, _ in _COLUMNS)
    body = "".join(
        f"<tr><td>{html.escape(row.setup)}</td>"
        + "".join(f"<td>{cell(row, column)}</td>" for _, _, column in _COLUMNS)
        + "</tr>"
        for row in comparison.rows
    )
    groups_row = f'<tr class="group"><th></th>{head}</tr>'
    table = f"<table><thead>{groups_row}<tr><th>setup</th>{names}</tr></thead><tbody>{body}</tbody></table>"
    return f'<style>{_TABLE_STYLE}</style><div class="wb-table">{table}</div>'


def cell(row: Row, column: str) -> str:
    """A value for people, with its unit; a missing one says why on hover."""
    value = getattr(row, column)
    if value is None:
        reason = getattr(row, {"peak_memory_bytes": "peak_memory_reason"}.get(column, f"{column}_reason"))
        return f'<span title="{html.escape(reason or "")}">n/a</span>'
    if column.endswith("_s"):
        return f"{1000 * value:.2f} ms"
    if column.endswith("_bytes"):
        return human_bytes(value)
    if column.endswith("_flops"):
        return f"{value:.3g}"
    if column == "joules":
        return f"{value:.2f} J"
    return f"{value:.3f}" if isinstance(value, float) else html.escape(str(value))


def _kept(label: str, trace: Trace) -> str:
    share = kept_share(trace).mean(0)
    tokens = trace.table("tokens")
    tokens = tokens[tokens["row"] == 0].drop_duplicates("position").sort_values("position")
    spans = "".join(
        f'<span style="background:rgba(0,114,178,{0.55 * share[position]:.2f})" '
        f'title="position {position}: held by {share[position]:.0%}">{html.escape(text or "")}</span>'
        for position, text in zip(tokens["position"], tokens["text"], strict=True)
    )
    return f"<h3>{html.escape(label)}</h3>{_figure(plots.cache_map(trace))}<div class='tokens'>{spans}</div>"


def _figure(figure: go.Figure) -> str:
    return figure.to_html(full_html=False, include_plotlyjs=False, config={"displaylogo": False, "responsive": True})


def _by_turn(comparison: Comparison) -> str:
    if comparison.turns.shape[1] < 2:
        return ""
    note = "Mean score of the 1st, 2nd, ... question. The context was compressed once, before the first."
    return f'<h2>Question by question</h2><p class="note">{note}</p>{_frame(comparison.turns.reset_index())}'


def _by_depth(comparison: Comparison) -> str:
    if comparison.depths.shape[1] < 2:
        return ""
    note = "Mean score by where the answer stands, in percent of the context."
    return f'<h2>By depth</h2><p class="note">{note}</p>{_frame(comparison.depths.reset_index())}'


def _left_alone(about: dict) -> str:
    if not about["sliding_layers"]:
        return ""
    return f'<p class="note">{about["sliding_layers"]} of {about["layers"]} layers slide over a window and were left alone.</p>'


def _ran_on(environment: dict) -> str:
    devices = ", ".join(environment["cuda_devices"]) or f"{environment['processor']}, {environment['threads']} threads"
    return f"{devices}; torch {environment['torch']}, transformers {environment['transformers']}"
