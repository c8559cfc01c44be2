"""How long a replay takes: twelve methods at ten budgets, and what one budget more takes once a recording was replayed.

usage: python benchmarks/replay.py [--model tiny-dense] [--tokens 4096] [--new-tokens 32] [--rounds 3]

Every round starts from the tensors alone. Prints the median seconds of the whole, and of one method at one new budget, by
the clock and by the processor: on a machine that others use, the processor's time divided by the threads is what is left.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median

import torch

import workbench as wb
from workbench.workloads.plain_text import prompt_tokens

METHODS = (
    *("streaming-llm", "h2o", "tova", "h2o:recent=0.25"),  # decide at every step
    *("snapkv", "pyramidkv", "knorm", "keydiff", "random"),  # decide once
    *("snapkv:window=16", "snapkv:kernel=7", "pyramidkv:window=16"),
)


def seconds(work: Callable[[], object]) -> tuple[float, float]:
    """Seconds of a piece of work by the clock and by the processor, all threads together."""
    clock, processor = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - clock, time.process_time() - processor


def main() -> None:
    """Runs the rounds and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-dense")
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    lm = wb.load(options.model)
    recording = wb.record(lm, prompt_tokens(lm, options.tokens - options.new_tokens), new_tokens=options.new_tokens)
    whole: list[tuple[float, float]] = []
    single: dict[str, list[tuple[float, float]]] = {name: [] for name in METHODS}
    wb.replay(recording, METHODS[:1], [1])  # a warm-up
    for round_number in range(options.rounds):
        recording.derived.clear()
        whole.append(seconds(lambda: wb.replay(recording, METHODS)))
        budget = 100 + round_number
        for name, taken in single.items():
            taken.append(seconds(lambda name=name, budget=budget: wb.replay(recording, [name], [budget])))
    print(f"{recording!r}, {torch.get_num_threads()} threads, medians of {options.rounds}: clock, processor")
    print(f"{len(METHODS)} methods x 10 budgets: {_line(whole)}")
    for name, taken in single.items():
        print(f"one budget of {name}: {_line(taken)}")


def _line(taken: list[tuple[float, float]]) -> str:
    clock, processor = (1000 * median(column) for column in zip(*taken, strict=True))
    return f"{clock:.0f} ms, {processor:.0f} ms"


if __name__ == "__main__":
    main()
