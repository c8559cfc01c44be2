"""Tables for a terminal: a value in, lines on standard output."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from workbench.plots.theme import human_bytes, human_seconds

if TYPE_CHECKING:
    import pandas as pd

    from workbench.cost.hardware import Hardware
    from workbench.cost.roofline import Prediction
    from workbench.trace.check import Check
    from workbench.trace.comparison import Comparison
    from workbench.trace.replay import Replay

_BUSY = 0.9
"""Share of a core below which a calibration says that the machine was busy."""

_out = Console()


def print_comparison(comparison: Comparison) -> None:
    """One row a setup, then scores by question and by depth where there are several."""
    about = comparison.about
    _out.print(f"[bold]{about['workload']} on {about['model']}[/bold] ({comparison.settings})", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("setup", overflow="fold")
    routes = any(row.rerouted is not None or row.decoded is not None for row in comparison.rows)
    for name in ("score", "KL", "KV held", *(["FFN read"] if routes else []), "TTFT", "TPOT", "fired"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in comparison.rows:
        acted = [(row.fired_layers, row.layers, row.fired_steps, row.steps), row.rerouted or (0, 0, 0, 0)]
        fired = [f"{layers}/{all_layers} {steps}/{due}" for layers, all_layers, steps, due in acted if due]
        fired += ["{}/{} tokens".format(*row.decoded)] if row.decoded is not None else []
        times = [f"{1000 * seconds:.1f}" for seconds in (row.ttft_s, row.tpot_s)]
        sizes = [human_bytes(row.kv_physical_bytes), *([human_bytes(row.ffn_read_bytes or 0)] if routes else [])]
        table.add_row(row.setup, f"{row.score:.3f}", f"{row.kl_to_dense:.3f}", *sizes, *times, "\n".join(fired) or "-")
    _out.print(table)
    _out.print("KL to dense: nats a token. TTFT, TPOT: ms. Fired: layers and steps acted on, of those due.", style="dim")
    if any(row.decoded is not None for row in comparison.rows):
        _out.print("Tokens: taken from a draft or another model, of those found; TPOT: their steps over these.", style="dim")
    if routes:
        _out.print("FFN read: weights of experts and FFNs after the prefill, modelled, a sample.", style="dim")
    for heading, scores in (("question", comparison.turns), ("depth, %", comparison.depths)):
        if scores.shape[1] > 1:
            _print_scores(heading, scores)
    for setup, figures in comparison.decoding.iterrows():
        said = ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.dropna().items())
        _out.print(f"{setup}: {said}", style="dim", highlight=False)
    if about["sliding_layers"]:
        _out.print(f"{about['sliding_layers']} sliding-window layers were left alone.", style="dim")


def _print_scores(heading: str, scores: pd.DataFrame) -> None:
    """Scores by question or by depth."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column(f"score by {heading}", overflow="fold")
    for name in scores.columns:
        table.add_column(str(name), justify="right")
    for setup, values in scores.iterrows():
        table.add_row(str(setup), *(f"{value:.2f}" for value in values))
    _out.print(table)


def print_prediction(prediction: Prediction) -> None:
    """One row a phase and component, and whether it fits."""
    shape = ", ".join(f"{name.replace('_', ' ')} {size}" for name, size in prediction.shape.items())
    about = f"{prediction.model} on {prediction.hardware.label}, {prediction.dtype}"
    _out.print(f"[bold]{escape(about)}[/bold]" + (f" ({shape})" if shape else ""), highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("phase", "component"):
        table.add_column(name, no_wrap=True)
    for name in ("FLOPs", "bytes", "predicted", "share", "bound"):
        table.add_column(name, justify="right", no_wrap=True)
    for phase in prediction.phases.itertuples():
        for row in prediction.table[prediction.table["phase"] == phase.phase].itertuples():
            share = f"{row.predicted_s / phase.predicted_s:.1%}"
            counts = (f"{row.flops:.3g}", human_bytes(row.bytes), human_seconds(row.predicted_s), share, row.bound)
            table.add_row(phase.phase, row.component, *counts)
        each = "" if phase.steps == 1 else f"{human_seconds(phase.predicted_step_s)}/step"
        total = (
            f"{phase.flops:.3g}",
            human_bytes(phase.bytes),
            human_seconds(phase.predicted_s),
        )
        table.add_row(phase.phase, "total", *total, "", each, style="bold", end_section=True)
    _out.print(table)
    memory = prediction.memory
    parts = f"weights {human_bytes(memory.weights_bytes)} + KV cache {human_bytes(memory.kv_bytes)}"
    verdict = "fits" if memory.fits else f"does not fit: the memory of {memory.devices} of them is needed"
    _out.print(f"Memory: {parts} of {human_bytes(memory.memory_bytes)}: {verdict}.", highlight=False)
    for note in prediction.notes:
        _out.print(note, style="dim", highlight=False)


def print_beside(rows: list[dict[str, Any]]) -> None:
    """Predicted beside measured, one row a phase."""
    table = Table(title="Predicted beside measured, a step", title_justify="left")
    for name in ("phase", "steps", "measured, median", "shortest to longest", "predicted", "error"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for row in rows:
        spread = f"{human_seconds(row['measured_low_s'])} to {human_seconds(row['measured_high_s'])}"
        times = (human_seconds(row["measured_s"]), spread, human_seconds(row["predicted_s"]), f"{row['error_percent']:+.1f}%")
        table.add_row(row["phase"], str(row["steps"]), *times)
    _out.print(table)


def print_replay(replayed: Replay, checked: Check | None) -> None:
    """One row a method and budget, then the points that ran live."""
    about = replayed.about
    size = f"{about['prompt_tokens']} + {about['steps']} tokens, {len(about['layers'])} layers"
    _out.print(f"[bold]{about['model']}[/bold], {size}", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    selects = any(point.read is not None for point in replayed.points)
    sizes = {"KV held": "bytes", **({"KV read": "read_bytes"} if selects else {})}
    for name in ("method", "budget", "mass retained", "best possible", "output error", *sizes):
        table.add_column(name, justify="left" if name == "method" else "right")
    for point, row in zip(replayed.points, replayed.curves().to_dict("records"), strict=True):
        shares = [f"{row[name]:.3f}" for name in ("mass_retained", "oracle_mass", "output_error")]
        table.add_row(point.method, str(point.budget), *shares, *(human_bytes(row[name]) for name in sizes.values()))
    _out.print(table)
    _out.print("Shares of attention, and of the attention output's length; means over layers, heads and steps.", style="dim")
    if checked is None:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    for name in ("run live", "error foretold", "KL", "top-1", "overlap"):
        table.add_column(name, justify="left" if name == "run live" else "right")
    for point in checked.points:
        live = (f"{point.live_kl:.3f}", f"{point.live_top1:.3f}", f"{point.kept_overlap:.1%}")
        table.add_row(point.setup, f"{point.predicted_error:.3f}", *live)
    _out.print(table)
    _out.print(str(checked), highlight=False)


def print_machine(sheet: Hardware) -> None:
    """What calibration measured, one row a dtype, and whether the machine was busy meanwhile."""
    table = Table(title=sheet.label, title_justify="left")
    for name in ("dtype", "products, at best", "weights read", "beside each layer", "beside each step"):
        table.add_column(name, justify="left" if name == "dtype" else "right")
    for dtype, rates in sheet.rates.items():
        reads = f"{min(rates.reads.rates) / 1e9:.1f} to {max(rates.reads.rates) / 1e9:.1f} GB/s"
        beside = [f"{1e6 * seconds:.0f} µs" for seconds in (rates.layer_s, rates.step_s)]
        table.add_row(dtype, f"{sheet.peak_flops[dtype] / 1e9:.0f} GFLOP/s", reads, *beside)
    _out.print(table)
    if sheet.note:
        _out.print(sheet.note, style="dim")
    share = sheet.environment["cpu_share"]
    if share < _BUSY:
        _out.print(f"Only {share:.0%} of a core was free: calibrate again when the machine does nothing else.", style="yellow")


def print_profile(title: str, phases: list[dict[str, Any]]) -> None:
    """One row a phase of a run."""
    table = Table(title=escape(title), title_justify="left")
    for name in ("phase", "tokens", "time", "FLOPs", "bytes moved", "KV held", "KV by budget"):
        table.add_column(name, justify="left" if name == "phase" else "right")
    for row in phases:
        sizes = [human_bytes(row[name]) for name in ("bytes", "kv_physical_bytes", "kv_nominal_bytes")]
        table.add_row(row["phase"], str(row["tokens"]), f"{1000 * row['seconds']:.1f} ms", f"{row['flops']:.4g}", *sizes)
    _out.print(table)
    _out.print("Time and KV held are measured; FLOPs and bytes moved (fused) are modelled.", style="dim")


def print_hardware(sheets: list[Hardware]) -> None:
    """One row a hardware sheet."""
    table = Table(box=box.SIMPLE_HEAD, padding=(0, 1), collapse_padding=True, pad_edge=False)
    table.add_column("hardware", no_wrap=True)
    for column in ("fp32", "bf16", "fp8", "memory", "bandwidth"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("device", overflow="fold")
    for sheet in sheets:
        peaks = [
            f"{sheet.peak_flops[dtype] / 1e12:.4g}" if dtype in sheet.peak_flops else "-" for dtype in ("fp32", "bf16", "fp8")
        ]
        sizes = (f"{sheet.memory_bytes / 1e9:.4g}", f"{sheet.bandwidth / 1e9:.4g}")
        table.add_row(sheet.name, *peaks, *sizes, escape(sheet.label))
    _out.print(table)
    _out.print("Peaks: dense TFLOP/s. Memory: GB. Bandwidth: GB/s. Sources: workbench hardware NAME.", style="dim")


def print_methods(described: list[dict[str, Any]]) -> None:
    """One row a method, as `describe` has it."""
    table = Table(show_lines=True)
    for name in ("method", "slot", "what it does", "knobs"):
        table.add_column(name)
    for entry in described:
        knobs = "\n".join(f"{knob['name']}={knob['default']} [dim]{knob['unit']}[/dim]" for knob in entry["knobs"])
        about = f"{entry['summary']}\n[dim]{entry['paper']}[/dim]"
        if entry["calibrated_by"] is not None:
            about += "\n[yellow]workbench calibrate[/yellow] once a model"
        table.add_row(entry["name"], entry["slot"], about, knobs)
    _out.print(table)


def print_calibrations(model: str, known: dict[str, dict[str, Any] | None]) -> None:
    """One row a method that needs a calibration: what it was made with, or how to make it."""
    table = Table(title=escape(f"Methods that need a calibration, on {model}"), title_justify="left")
    for name in ("method", "calibrated", "with"):
        table.add_column(name)
    for name, about in known.items():
        texts = f"{about['documents']} texts ({about['texts']}), {about['tokens']} tokens" if about else ""
        todo = f"no: workbench calibrate --model {model} --method {name}"
        table.add_row(name, "yes" if about else escape(todo), texts)
    _out.print(table)


def print_workloads(listed: list[dict[str, Any]]) -> None:
    """One row a workload."""
    table = Table(show_lines=True)
    for name in ("workload", "what it does", "settings"):
        table.add_column(name)
    for entry in listed:
        table.add_row(entry["name"], entry["summary"], "\n".join(f"{key}={value}" for key, value in entry["settings"].items()))
    _out.print(table)


def print_models(entries: list[dict[str, Any]]) -> None:
    """One row a model that needs no hub."""
    table = Table()
    for name in ("model", "class", "parameters", "layers", "context", "ready"):
        table.add_column(name)
    for entry in entries:
        shape = [
            str(entry[key] if entry[key] is not None else "?") for key in ("class_name", "parameters", "layers", "context")
        ]
        table.add_row(entry["name"], *shape, "yes" if entry["ready"] else escape(entry["how"]))
    _out.print(table)


def print_checks(found: list[dict[str, Any]]) -> None:
    """One row a check of `workbench doctor`."""
    table = Table()
    for name in ("check", "", "detail"):
        table.add_column(name, overflow="fold")
    for check in found:
        table.add_row(check["name"], "[green]ok[/green]" if check["ok"] else "[yellow]no[/yellow]", escape(check["detail"]))
    _out.print(table)
