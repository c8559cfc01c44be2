"""What observing costs: plain calls against `wb.profile` in each mode, torch's FLOP counter and torch's profiler.

usage: python benchmarks/overhead.py [--model tiny-dense] [--context 2048] [--steps 4] [--pairs 40] [--phase decode]

Of a mixture of experts (`--model tiny-moe --only routing`) also what seeing its routing costs, by itself and with the rest.

Bare and observed runs take turns in one process, each going first in every other pair; each figure is the median of the
pairwise ratios of the seconds of all steps together (decode), or of the prompt (prefill). The first pair of each is a
warm-up. 1.02 means 2% slower than bare. The last column is the range the middle half of the ratios lies in.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import workbench as wb
from workbench.models.anatomy import expert_modules
from workbench.probes.moe import MODES, RoutingProbe
from workbench.workloads.plain_text import prompt_tokens

Observer = Callable[[], AbstractContextManager]


def observers(lm: wb.LM) -> dict[str, Observer]:
    """Everything that is compared, by name."""
    modes = {mode: (lambda mode=mode: wb.profile(lm.model, importance=mode)) for mode in ("off", "decode", "window", "full")}
    routing: dict[str, Observer] = {}
    for mode in MODES if expert_modules(lm.model) else ():
        routing[f"routing alone, {mode}"] = lambda mode=mode: routing_alone(lm, mode)
        routing[f"wb.profile, routing {mode}"] = lambda mode=mode: wb.profile(lm.model, routing=mode)
    return {
        **{f"wb.profile, importance {mode}": observer for mode, observer in modes.items()},
        **routing,
        "torch FlopCounterMode": lambda: FlopCounterMode(display=False),
        "torch.profiler": lambda: torch.profiler.profile(),
    }


@contextmanager
def routing_alone(lm: wb.LM, mode: str) -> Iterator[None]:
    """Sees the routing, and nothing else."""
    probe = RoutingProbe(lm.model, mode)
    probe.attach()
    try:
        yield
    finally:
        probe.detach()


@torch.no_grad()
def decode_seconds(lm: wb.LM, prompt: torch.Tensor, steps: int) -> Callable[[Observer], float]:
    """Measures `steps` decode steps after the prompt, which runs once and is not timed."""
    prefilled = DynamicCache(config=lm.model.config)
    lm.model(prompt, past_key_values=prefilled, logits_to_keep=1)
    token = prompt[:, -1:]

    @torch.no_grad()
    def measure(observer: Observer) -> float:
        cache = copy.deepcopy(prefilled)
        with observer():
            lm.model(token)  # a profile looks closer at the first call without a past,
            lm.model(token, past_key_values=cache, logits_to_keep=1)  # and at the first with one
            return seconds(lm, lambda: [lm.model(token, past_key_values=cache, logits_to_keep=1) for _ in range(steps)])

    return measure


def prefill_seconds(lm: wb.LM, prompt: torch.Tensor) -> Callable[[Observer], float]:
    """Measures the prompt."""

    @torch.no_grad()
    def measure(observer: Observer) -> float:
        with observer():
            return seconds(lm, lambda: lm.model(prompt, use_cache=True, logits_to_keep=1))

    return measure


def seconds(lm: wb.LM, work: Callable[[], object]) -> float:
    """Seconds until the work is done, on the device too."""
    started = time.perf_counter()
    work()
    if lm.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def pairwise_ratios(measure: Callable[[Observer], float], observer: Observer, pairs: int) -> list[float]:
    """Observed over bare, after one pair that does not count."""
    ratios = []
    for pair in range(pairs + 1):
        first, second = (nullcontext, observer) if pair % 2 else (observer, nullcontext)
        taken = {first: measure(first), second: measure(second)}
        ratios.append(taken[observer] / taken[nullcontext])
    return sorted(ratios[1:])


def main() -> None:
    """Runs the pairs and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-dense")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--phase", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--only", default="", help="Only what has this word in its name.")
    options = parser.parse_args()
    lm = wb.load(options.model)
    prompt = torch.tensor([prompt_tokens(lm, options.context)], device=lm.device)
    measure = prefill_seconds(lm, prompt) if options.phase == "prefill" else decode_seconds(lm, prompt, options.steps)
    print(f"{options.phase} of {options.model} at {options.context} tokens, median of {options.pairs} pairwise ratios")
    for name, observer in observers(lm).items():
        if options.only in name:
            ratios = pairwise_ratios(measure, observer, options.pairs)
            quarter = len(ratios) // 4
            print(f"| {name} | {median(ratios):.3f} | {ratios[quarter]:.3f} to {ratios[-1 - quarter]:.3f} |", flush=True)


if __name__ == "__main__":
    main()
