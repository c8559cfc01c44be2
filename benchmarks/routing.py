"""Quality against expert bytes read, for every routing method at several settings: a table, and a picture of it.

usage: python benchmarks/routing.py [--model tiny-moe] [--rows 1 8] [--context 128] [--tokens 48] [--texts 8] [--out routing]
           [--picture FILE.png]

The settings of a method are its own (`sweep`); methods that the model cannot run are named and left out. The picture is
taken by a headless Chromium.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import workbench as wb
from workbench.errors import UserError
from workbench.experiments.in_flight import quality_in_flight
from workbench.methods import METHODS, RoutingMethod
from workbench.models.load import LM
from workbench.pictures import photograph
from workbench.plots.quality_by_bytes import quality_by_bytes

WIDTH, HEIGHT = 1000, 480


def setups(lm: LM) -> list[RoutingMethod]:
    """Every routing method at each of its settings; those the model cannot run are named and left out."""
    found = []
    for cls in METHODS.values():
        if not issubclass(cls, RoutingMethod):
            continue
        methods = [cls(**knobs) for knobs in cls.sweep]
        try:
            for method in methods:
                wb.Session(lm, method)
            found += methods
        except UserError as refusal:
            print(f"{cls.name} is left out on {lm.name}: {refusal}")
    return found


def main() -> None:
    """Runs the methods, prints the table and draws it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-moe")
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--context", type=int, default=128)
    parser.add_argument("--tokens", type=int, default=48)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--out", type=Path, default=Path("routing"))
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    lm = wb.load(options.model)
    sizes = {"context": options.context, "tokens": options.tokens, "texts": options.texts}
    found = quality_in_flight(lm, setups(lm), options.rows, **sizes, on_progress=lambda *done: print(*done, flush=True))
    options.out.mkdir(parents=True, exist_ok=True)
    found.to_csv(options.out / "routing.csv", index=False)
    print(found.to_string(index=False, float_format="{:.4g}".format))
    about = f"{options.model}, prose, {options.context} + {options.tokens} tokens, {options.texts} texts"
    page = options.out / "routing.html"
    quality_by_bytes(found, title=about).update_layout(width=WIDTH, height=HEIGHT).write_html(
        page, config={"displayModeBar": False}
    )
    print(f"Figure: {page}")
    if options.picture:
        photograph(page, options.picture, WIDTH, HEIGHT)


if __name__ == "__main__":
    main()
