"""The command line: the same API, for a terminal or a script."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from workbench.errors import UserError

if TYPE_CHECKING:
    from workbench.trace.check import Check
    from workbench.trace.replay import Replay
    from workbench.workloads import Workload

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="See what LLM inference costs and what each method does to it. Add --debug to any command for a traceback.",
)

Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else to standard output.")]
Model = Annotated[str, typer.Option(help="A built-in model, gemma-3-270m, a directory or a hub id.")]
Methods = Annotated[
    list[str] | None,
    typer.Option("--methods", "--method", help="NAME:knob=value,… of each, separated by spaces; of several slots A+B."),
]
Budgets = Annotated[
    list[str] | None,
    typer.Option("--budgets", "--budget", help="Shares of the prompt (0.2) or tokens (128), separated by spaces."),
]

_LISTS = ("--methods", "--budgets", "--contexts")
"""Options that take all values up to the next option."""

DEMO_METHODS = ("streaming-llm", "h2o", "snapkv")
DEMO_BUDGETS = (0.75, 0.5, 0.2)

_out = Console()
_err = Console(stderr=True)


def main() -> None:
    """Runs the command line. A UserError is one sentence and exit code 2."""
    arguments = sys.argv[1:]
    debug = "--debug" in arguments
    try:
        app(_listed([argument for argument in arguments if argument != "--debug"]))
    except UserError as error:
        if debug:
            raise
        _err.print(f"[red]Error:[/red] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise SystemExit(2) from None
    except Exception as error:
        if debug:
            raise
        kind = type(error).__name__
        _err.print(f"[red]Failed:[/red] {kind}: {escape(str(error))} Run again with --debug for the traceback.", soft_wrap=True)
        raise SystemExit(1) from None


def _listed(arguments: list[str]) -> list[str]:
    """`--methods a b` as `--methods a --methods b`, which is how the parser takes several values."""
    spread: list[str] = []
    option = None
    for argument in arguments:
        if argument.startswith("--"):
            option = argument if argument in _LISTS else None
            spread += [] if option else [argument]
        else:
            spread += [option, argument] if option else [argument]
    return spread


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the report and the traces.")] = Path("demo"),
    as_json: Json = False,
) -> None:
    """Compare dense with three cache methods on the built-in model, and write a report."""
    from workbench.workloads import WORKLOADS

    methods = [f"{name}:budget={budget}" for budget in DEMO_BUDGETS for name in DEMO_METHODS]
    _compare("tiny-dense", [WORKLOADS["recall"](context=512, samples=8)], methods, out, True, as_json)


@app.command()
def profile(
    model: Model = "tiny-dense",
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 text file with the prompt.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Without a prompt: this many tokens of standard-library text.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode.")] = 32,
    method: Annotated[
        str, typer.Option(help="NAME:knob=value,knob=value; see `workbench methods`. Of several slots: A+B.")
    ] = "dense",
    importance: Annotated[str, typer.Option(help="off, decode, window or full: record attention mass by position.")] = "off",
    spans: Annotated[bool, typer.Option(help="Time every layer and its parts too.")] = False,
    out: Annotated[Path, typer.Option(help="Folder for the trace.")] = Path("run.trace"),
    as_json: Json = False,
) -> None:
    """Record a trace of a prompt and its continuation, and print what each phase costs."""
    from workbench.engine.session import Session
    from workbench.methods import parse_setup
    from workbench.models.load import load
    from workbench.terminal import print_profile

    text = _prompt_text(prompt, prompt_file)
    chosen = parse_setup(method)
    if new_tokens < 1:
        raise UserError(f"--new-tokens cannot be {new_tokens}; ask for 1 or more.")
    if text is None and prompt_tokens < 1:
        raise UserError(f"--prompt-tokens cannot be {prompt_tokens}; ask for 1 or more.")
    lm = load(model)
    ids = _prompt_ids(lm, text, prompt_tokens)
    limit = lm.anatomy.max_positions
    if limit is not None and len(ids) + new_tokens > limit:
        raise UserError(
            f"{len(ids)} prompt tokens and {new_tokens} new ones do not fit {model}, whose context is {limit}; shorten either."
        )
    session = Session(lm, chosen, importance=importance, spans=spans, out=out)
    with _progress(as_json) as advance:
        session.prefill(ids)
        done = 0

        def count(_: list[int]) -> None:
            nonlocal done
            done += 1
            advance("decode", done, new_tokens)

        session.generate(new_tokens, on_token=count, stop_at_end=False)
    session.close()
    summary = session.trace.summary()
    columns = ["phase", "tokens", "seconds", "flops", "bytes", "kv_physical_bytes", "kv_nominal_bytes"]
    phases = summary[columns].to_dict("records")
    if as_json:
        _print_json({"trace": str(out), "phases": phases})
        return
    print_profile(f"{model}, {session.setup.label}, {len(ids)} + {new_tokens} tokens", phases)
    _out.print(f"Trace: {out}", highlight=False)


@app.command()
def compare(
    source: Annotated[str | None, typer.Argument(metavar="[MODEL]", help="The model; tiny-dense by default.")] = None,
    model: Annotated[str | None, typer.Option(help="The same, as an option.")] = None,
    workload: Annotated[str, typer.Option(help="NAME:setting=value,…; see `workbench workloads`.")] = "recall",
    context: Annotated[
        list[int] | None, typer.Option("--contexts", "--context", help="Tokens of each context: one or several lengths; 512.")
    ] = None,
    samples: Annotated[int, typer.Option(help="How many contexts.")] = 8,
    seed: Annotated[int, typer.Option(help="Seed of the contexts.")] = 0,
    query_aware: Annotated[bool, typer.Option(help="Let methods see the question when they compress.")] = False,
    method: Methods = None,
    budget: Budgets = None,
    out: Annotated[Path, typer.Option(help="Folder for the report, the rows and the traces.")] = Path("comparison"),
    fresh: Annotated[bool, typer.Option("--fresh", help="Run what is finished in the folder again, too.")] = False,
    as_json: Json = False,
) -> None:
    """Run methods at budgets on a workload: quality beside cost, in a table and a report. Goes on where it was cut short."""
    from workbench.workloads import parse_workload

    if source is not None and model is not None:
        raise UserError(f"Give the model once: {source!r} or --model {model}.")
    given: dict[str, Any] = {"samples": samples, "seed": seed, **({"query_aware": True} if query_aware else {})}
    lengths = list(dict.fromkeys(context or [512]))
    workloads = [parse_workload(workload, context=length, **given) for length in lengths]
    methods = _at_budgets(method or [], [_budget(text) for text in budget or []])
    _compare(source or model or "tiny-dense", workloads, methods, out, fresh, as_json)


@app.command()
def predict(
    model: Annotated[str | None, typer.Option(help="A model's name, a directory with a config.json, or such a file.")] = None,
    trace: Annotated[Path | None, typer.Option(help="In place of a model: a trace, whose counts are taken.")] = None,
    hardware: Annotated[str, typer.Option(help="A sheet of `workbench hardware`, this-machine, or a JSON file.")] = "h100-sxm",
    dtype: Annotated[str | None, typer.Option(help="fp32, tf32, bf16, fp16, fp8 or int8; by default the model's own.")] = None,
    batch: Annotated[int | None, typer.Option(help="Rows; 1 by default.")] = None,
    context: Annotated[int | None, typer.Option(help="Prompt tokens a row; 1024 by default.")] = None,
    new_tokens: Annotated[int | None, typer.Option(help="Decode steps; 128 by default.")] = None,
    as_json: Json = False,
) -> None:
    """Predict seconds by component on any hardware, from a config alone or from a trace, and whether it fits."""
    from workbench.cost.hardware import hardware as sheet
    from workbench.cost.roofline import predict as run
    from workbench.models.load import anatomy
    from workbench.terminal import print_beside, print_prediction
    from workbench.trace.trace import Trace

    if (model is None) == (trace is None):
        raise UserError("Give either --model or --trace, and not both.")
    device = sheet(hardware)
    sizes = {"batch": batch, "context": context, "new_tokens": new_tokens}
    for name, size in sizes.items():
        least = 0 if name == "new_tokens" else 1
        if size is not None and size < least:
            raise UserError(f"--{name.replace('_', '-')} cannot be {size}; ask for {least} or more.")
    source = Trace.load(trace) if trace is not None else anatomy(str(model))
    prediction = run(source, device, dtype=dtype, **sizes)
    beside = _beside(source, device) if isinstance(source, Trace) else None
    if as_json:
        found = prediction.to_dict()
        _print_json(found if beside is None else {**found, "beside_measured": beside})
        return
    print_prediction(prediction)
    if beside:
        print_beside(beside)


@app.command("hardware")
def hardware_sheets(
    name: Annotated[str | None, typer.Argument(help="One sheet: its name, or a JSON file.")] = None, as_json: Json = False
) -> None:
    """List the hardware sheets with their sources, or show one."""
    from workbench.cost.hardware import HARDWARE, THIS_MACHINE, this_machine_file
    from workbench.cost.hardware import hardware as sheet
    from workbench.terminal import print_hardware

    if name is not None:
        chosen = [sheet(name)]
    else:
        chosen = [*HARDWARE.values(), *([sheet(THIS_MACHINE)] if this_machine_file().exists() else [])]
    if as_json:
        found = [each.to_dict() for each in chosen]
        _print_json(found[0] if name is not None else found)
        return
    print_hardware(chosen)
    if name is not None:
        for line in [*chosen[0].sources, *([chosen[0].note] if chosen[0].note else [])]:
            _out.print(line, highlight=False, soft_wrap=True)
    elif not this_machine_file().exists():
        _out.print("This machine is not among them yet: workbench doctor --calibrate", style="dim", highlight=False)


@app.command()
def replay(
    source: Annotated[str | None, typer.Argument(help="A model to record, or the folder of a saved recording.")] = None,
    model: Annotated[str | None, typer.Option(help="With a recording and --check: the model that was recorded.")] = None,
    prompt: Annotated[str | None, typer.Option(help="The prompt itself.")] = None,
    prompt_file: Annotated[Path | None, typer.Option(help="A UTF-8 text file with the prompt.")] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Without a prompt: this many tokens of standard-library text.")] = 512,
    new_tokens: Annotated[int, typer.Option(help="Tokens to decode; the replay is measured on them.")] = 32,
    method: Methods = None,
    budget: Budgets = None,
    check: Annotated[bool, typer.Option("--check", help="Run a few points live, and say how well they were foretold.")] = False,
    check_points: Annotated[int, typer.Option(help="How many points --check runs.")] = 6,
    out: Annotated[Path | None, typer.Option(help="A .html, .csv or .json file for the result.")] = None,
    save: Annotated[Path | None, typer.Option(help="Folder to keep a new recording in.")] = None,
    as_json: Json = False,
) -> None:
    """Record a dense run once, or open a recording, and show what each method would have kept of it at each budget."""
    from workbench.experiments.check import check_replay
    from workbench.experiments.record import record
    from workbench.experiments.replay import BUDGETS
    from workbench.experiments.replay import replay as run
    from workbench.models.load import load
    from workbench.terminal import print_replay
    from workbench.trace.recording import Recording

    methods, budgets = method or list(DEMO_METHODS), [_budget(text) for text in budget or []] or list(BUDGETS)
    if out is not None:
        if out.suffix not in _REPLAY_FORMATS:
            raise UserError(f"Cannot write a replay to {out}; name a file that ends in {', '.join(_REPLAY_FORMATS)}.")
        _check_writable(out.parent)
    text = _prompt_text(prompt, prompt_file)
    if source is not None and (Path(source) / "meta.json").exists():
        if save is not None or text is not None:
            raise UserError(f"{source} is a recording already; leave out --save and the prompt.")
        if check and model is None:
            raise UserError("--check runs the recorded model again; say which with --model.")
        recorded = Recording.load(source)
        lm = load(model) if check and model is not None else None
    else:
        if source is not None and model is not None:
            raise UserError(f"Give the model once: {source!r} or --model {model}.")
        if save is not None:
            _check_writable(save)
        if text is None and prompt_tokens < 1:
            raise UserError(f"--prompt-tokens cannot be {prompt_tokens}; ask for 1 or more.")
        lm = load(source or model or "tiny-dense")
        recorded = record(lm, _prompt_ids(lm, text, prompt_tokens), new_tokens=new_tokens, rehearse=methods)
    replayed = run(recorded, methods, budgets)
    with _progress(as_json) as advance:
        checked = check_replay(lm, recorded, replayed, points=check_points, on_progress=advance) if check and lm else None
    if save is not None:
        recorded.save(save)
    if out is not None:
        _REPLAY_FORMATS[out.suffix](out, replayed, checked)
    if as_json:
        written = {"recording": save, "written": out}
        paths = {name: None if path is None else str(path) for name, path in written.items()}
        _print_json({**_replay_dict(replayed, checked), **paths})
        return
    print_replay(replayed, checked)
    for name, path in (("Recording", save), ("Written", out)):
        if path is not None:
            _out.print(f"{name}: {path}", highlight=False)


@app.command()
def export(
    trace: Annotated[Path, typer.Argument(help="A trace folder.")],
    out: Annotated[Path, typer.Option(help="A .json file for Perfetto, or a folder for CSV files.")],
    kind: Annotated[str, typer.Option("--format", help="perfetto or csv.")] = "perfetto",
    as_json: Json = False,
) -> None:
    """Turn a trace into Chrome/Perfetto JSON or CSV files. The trace's own tables are Parquet already."""
    from workbench.trace.trace import Trace

    writers = {"perfetto": Trace.to_perfetto, "csv": Trace.to_csv}
    if kind not in writers:
        raise UserError(f"There is no export format {kind!r}; the formats are {', '.join(writers)}.")
    written = writers[kind](Trace.load(trace), out)
    if as_json:
        _print_json({"written": str(written)})
    else:
        _out.print(f"Written: {written}", highlight=False)


@app.command()
def methods(
    as_json: Json = False,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the table of the README.")] = False,
) -> None:
    """List the methods with their knobs."""
    from workbench.methods import METHODS, describe
    from workbench.methods.base import markdown_table
    from workbench.terminal import print_methods

    if markdown:
        print(markdown_table())
        return
    described = [describe(cls) for cls in METHODS.values()]
    if as_json:
        _print_json(described)
        return
    print_methods(described)


@app.command()
def calibrate(
    model: Model = "tiny-dense",
    method: Annotated[
        list[str] | None, typer.Option(help="NAME:knob=value,…; may be given several times. Without one, list what there is.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Find out what a method has to know about a model beforehand, and keep it; or list what is known of a model."""
    from workbench.engine.calibration import calibration_file
    from workbench.experiments.calibrate import calibrate as run
    from workbench.experiments.calibrate import calibrations
    from workbench.methods import parse_method
    from workbench.models.load import load
    from workbench.terminal import print_calibrations

    chosen = [parse_method(text) for text in method or []]
    lm = load(model)
    if not chosen:
        known = {name: None if found is None else dict(found.about) for name, found in calibrations(lm).items()}
        if as_json:
            _print_json({"model": model, "calibrations": known})
            return
        print_calibrations(model, known)
        return
    with _progress(as_json) as advance:
        found = [run(lm, each, on_progress=advance) for each in chosen]
    places = [str(calibration_file(each.model, known)) for each, known in zip(found, chosen, strict=True)]
    if as_json:
        rows = [{"method": each.method, "knobs": dict(each.knobs), "model": each.model, **each.about} for each in found]
        _print_json([{**row, "written": place} for row, place in zip(rows, places, strict=True)])
        return
    for each, place in zip(found, places, strict=True):
        _out.print(f"{each.method} is calibrated for {model}: {place}", highlight=False, soft_wrap=True)


@app.command()
def workloads(as_json: Json = False) -> None:
    """List the workloads with their settings."""
    from workbench.terminal import print_workloads
    from workbench.workloads import WORKLOADS

    listed = [
        {
            "name": name,
            "summary": cls.summary(),
            "settings": {option.name: option.default for option in dataclasses.fields(cls)},
        }
        for name, cls in WORKLOADS.items()
    ]
    if as_json:
        _print_json(listed)
        return
    print_workloads(listed)


@app.command()
def models(as_json: Json = False) -> None:
    """List the models that need no hub."""
    from workbench.models.catalogue import catalogue
    from workbench.terminal import print_models

    entries = catalogue()
    if as_json:
        _print_json(entries)
        return
    print_models(entries)


@app.command()
def lab(
    folder: Annotated[Path, typer.Argument(metavar="[DIR]", help="Folder of yours for the notebooks.")] = Path(
        "workbench-notebooks"
    ),
    port: Annotated[int, typer.Option(help="Port on this computer.")] = 8888,
    browser: Annotated[bool, typer.Option("--browser/--no-browser", help="Whether to open a browser.")] = True,
) -> None:
    """Copy the notebooks to a folder of yours, keeping what you changed there, and start JupyterLab in it."""
    from workbench.lab import check_lab, copy_notebooks, start_lab

    check_lab(port)
    kept = copy_notebooks(folder)
    _out.print(f"Notebooks: {folder}", highlight=False)
    if kept:
        names = ", ".join(path.name for path in kept)
        _out.print(f"Kept as they were, since they differ from those shipped: {names}", highlight=False, soft_wrap=True)
    start_lab(folder, port, browser)


@app.command()
def dashboard(
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8501,
    host: Annotated[str, typer.Option(help="Address to listen on; whoever reaches it may load models.")] = "127.0.0.1",
) -> None:
    """Serve the dashboard to a browser until it is stopped."""
    from workbench_dashboard.launch import launch

    launch(host, port)


@app.command()
def doctor(
    calibrate: Annotated[
        bool, typer.Option("--calibrate", help="Measure what this machine reaches, for `workbench predict`; takes a minute.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Say what works on this machine, and why something does not."""
    if calibrate:
        _measure_machine(as_json)
        return
    from workbench.doctor import checks
    from workbench.probes.environment import environment
    from workbench.terminal import print_checks

    found = checks()
    if as_json:
        _print_json({"environment": environment(), "checks": found})
        return
    print_checks(found)


def _measure_machine(as_json: bool) -> None:
    from workbench.experiments.machine import measure_machine, store
    from workbench.terminal import print_machine

    with _progress(as_json) as advance:
        sheet = measure_machine(on_progress=advance)
    path = store(sheet)
    if as_json:
        _print_json({"written": str(path), "sheet": sheet.to_dict()})
        return
    print_machine(sheet)
    _out.print(f"Kept as hardware this-machine: {path}", highlight=False)


def _beside(trace, device) -> list[dict[str, Any]] | None:
    """Predicted beside measured, where the sheet is this machine's and so is the trace."""
    from workbench.cost.beside import beside_measured

    return beside_measured(trace, device).to_dict("records") if device.rates else None


def _compare(model: str, workloads: list[Workload], methods: list[str], out: Path, fresh: bool, as_json: bool) -> None:
    """Compares on each workload; the results of several lie in folders of their own, and what is finished in one."""
    from workbench.experiments.compare import compare as run
    from workbench.methods import parse_setup
    from workbench.models.load import load
    from workbench.report import write_contexts_report
    from workbench.terminal import print_comparison

    setups = [parse_setup(text) for text in methods]
    lm = load(model)
    _check_writable(out)
    for workload in workloads:
        workload.episodes(lm)  # what does not fit is said before anything runs
    comparisons, printed = [], []
    for workload in workloads:
        folder = out if len(workloads) == 1 else out / f"context-{workload.context}"
        with _progress(as_json) as advance:
            comparison = run(lm, workload, setups, out=out, fresh=fresh, on_progress=advance)
        comparison.save(folder)
        report = comparison.report(folder / "report.html")
        comparisons.append(comparison)
        printed.append({**comparison.to_dict(), "report": str(report)})
        if not as_json:
            print_comparison(comparison)
            _out.print(f"Report: {report}", highlight=False)
    if len(comparisons) == 1:
        if as_json:
            _print_json(printed[0])
        return
    together = write_contexts_report(comparisons, out / "report.html")
    if as_json:
        _print_json({"comparisons": printed, "report": str(together)})
        return
    _out.print(f"All contexts: {together}", highlight=False)


def _at_budgets(methods: list[str], budgets: list[float | int]) -> list[str]:
    """Each method in text form at each budget, or as it is if no budgets are given."""
    for text in methods if budgets else []:
        if "budget=" in text:
            raise UserError(f"{text!r} has a budget of its own; leave that or --budgets out.")
    joined = [f"{text}{',' if ':' in text else ':'}budget={budget}" for text in methods for budget in budgets]
    return joined if budgets else methods


def _replay_dict(replayed: Replay, checked: Check | None) -> dict[str, Any]:
    rows = replayed.curves().to_dict("records")
    return {"about": replayed.about, "rows": rows, "check": None if checked is None else checked.to_dict()}


def _write_replay_html(path: Path, replayed: Replay, checked: Check | None) -> None:
    from workbench.report import write_replay_report

    write_replay_report(replayed, checked, path)


_REPLAY_FORMATS = {
    ".html": _write_replay_html,
    ".csv": lambda path, replayed, _: replayed.curves().to_csv(path, index=False),
    ".json": lambda path, replayed, checked: path.write_text(json.dumps(_replay_dict(replayed, checked), indent=1)),
}
"""How a replay is written, by the file's suffix."""


def _budget(text: str) -> float | int:
    try:
        return int(text) if text.strip().isdigit() else float(text)
    except ValueError:
        raise UserError(
            f"--budgets cannot be {text!r}; write a fraction such as 0.2, or a number of tokens such as 128."
        ) from None


def _prompt_text(prompt: str | None, prompt_file: Path | None) -> str | None:
    """The prompt given, or None for standard-library text. Raises UserError for an empty or unreadable one."""
    if prompt is not None and prompt_file is not None:
        raise UserError("Give either --prompt or --prompt-file, not both.")
    if prompt_file is None:
        if prompt is not None and not prompt.strip():
            raise UserError("The prompt is empty; give some text, or leave --prompt out to use standard-library text.")
        return prompt
    try:
        text = prompt_file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{prompt_file} is not UTF-8 text; give a text file.") from None
    except OSError as error:
        raise UserError(f"Cannot read {prompt_file} ({error.strerror}); give a text file.") from None
    if "\0" in text:
        raise UserError(f"{prompt_file} holds zero bytes, so it is no text; give a text file.")
    if not text.strip():
        raise UserError(f"{prompt_file} is empty; put the prompt into it.")
    return text


def _prompt_ids(lm, text: str | None, num_tokens: int) -> list[int]:
    from workbench.workloads.plain_text import prompt_tokens

    return list(prompt_tokens(lm, num_tokens)) if text is None else lm.tokenizer(text, verbose=False).input_ids


def _check_writable(directory: Path) -> None:
    """Raises UserError before a long run if its results could not be written."""
    nearest = directory
    while not nearest.exists():
        nearest = nearest.parent
    probe = nearest / ".workbench-probe"
    try:
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"Cannot write to {directory} ({error.strerror}); choose another folder with --out.") from None


@contextmanager
def _progress(quiet: bool) -> Iterator[Any]:
    """A progress bar on standard error; yields `advance(label, done, total)`."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    progress = Progress(*columns, console=_err, transient=True, disable=quiet)
    tasks: dict[str, Any] = {}

    def advance(label: str, done: int, total: int) -> None:
        progress.start()
        if label not in tasks:
            tasks[label] = progress.add_task(label, total=total)
        progress.update(tasks[label], completed=done)

    try:
        yield advance
    finally:
        if tasks:
            progress.stop()


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=1))


if __name__ == "__main__":
    main()
