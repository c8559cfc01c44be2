"""Every cache method at several budgets on several models: one map of scores a model, and a picture of them.

usage: python benchmarks/quality.py [--models tiny-dense:4 tiny-moe:4 gemma-3-270m:1] [--budgets 0.05 0.1 0.2 0.35 0.5]
           [--workload recall] [--context 512] [--out quality] [--picture FILE.png]

A model is given with the number of contexts it is tried on. Finished results stay in the folder, and a second run goes on
from there. The picture is taken by a headless Chromium. Methods have their default knobs, but for those in `FITTING`.
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

import workbench as wb
from workbench.errors import UserError
from workbench.methods.base import METHODS
from workbench.pictures import photograph
from workbench.plots.score_map import score_map, score_table
from workbench.trace.comparison import Comparison
from workbench.workloads.base import parse_workload

FITTING = {"duo-attention": {"sinks": 4, "recent": 32}, "lazy-eviction": {"window": 4}}
"""Knobs whose defaults are made for longer texts and answers than those asked for here."""

WIDTH = 500
"""Pixels of each map."""


def cache_methods() -> list[str]:
    """Every registered method that has a budget."""
    fields = {name: {field.name for field in dataclasses.fields(cls)} for name, cls in METHODS.items() if cls.slot == "cache"}
    return [name for name, knobs in fields.items() if "budget" in knobs]


def run(model: str, samples: int, options: argparse.Namespace) -> Comparison:
    """All methods on one model; those the model cannot run are named and left out."""
    lm = wb.load(model)
    workload = dataclasses.replace(parse_workload(options.workload), context=options.context, samples=samples)
    setups = []
    for name in options.methods or cache_methods():
        methods = [METHODS[name](budget=budget, **FITTING.get(name, {})) for budget in options.budgets]
        try:
            wb.Session(lm, methods[0]).prefill(workload.episodes(lm)[0].context)
            setups += methods
        except UserError as refusal:
            print(f"{name} is left out on {model}: {refusal}")
    return wb.compare(lm, workload, setups, out=options.out, on_progress=lambda *done: print(model, *done, flush=True))


def main() -> None:
    """Runs the models in turn, prints their tables and draws them side by side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["tiny-dense:4", "tiny-moe:4", "gemma-3-270m:1"])
    parser.add_argument("--methods", nargs="+")
    parser.add_argument("--budgets", nargs="+", type=float, default=[0.05, 0.1, 0.2, 0.35, 0.5])
    parser.add_argument("--workload", default="recall")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--out", type=Path, default=Path("quality"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    figures = []
    for text in options.models:
        model, _, samples = text.partition(":")
        comparison = run(model, int(samples or 4), options)
        print(f"\n{model}: score by budget\n{score_table(comparison).to_string(float_format='{:.2f}'.format)}\n")
        figures.append(score_map(comparison))
    page = options.out / "scores.html"
    maps = [
        figure.update_layout(width=WIDTH).to_html(
            full_html=False, include_plotlyjs="inline" if not number else False, config={"displayModeBar": False}
        )
        for number, figure in enumerate(figures)
    ]
    page.write_text("<meta charset='utf-8'><body style='display: flex; margin: 0'>" + "".join(maps))
    print(f"Maps: {page}")
    if options.picture:
        photograph(page, options.picture, WIDTH * len(figures), max(int(figure.layout.height) for figure in figures))


if __name__ == "__main__":
    main()
