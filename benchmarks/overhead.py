"""What observing costs: plain calls against `wb.profile` in each mode, torch's FLOP counter and torch's profiler.

usage: python benchmarks/overhead.py [--model tiny-dense] [--context 2048] [--steps 32] [--pairs 5] [--phase decode]

Bare and observed runs take turns in one process; each figure is the median of the pairwise ratios of the seconds of all
steps together (decode), or of the prompt (prefill). The first pair of each is a warm-up. 1.02 means 2% slower than bare.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from statistics import median

import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import workbench as wb
from workbench.workloads.plain_text import prompt_tokens

Observer = Callable[[], AbstractContextManager]


def observers(lm: wb.LM) -> dict[str, Observer]:
    """Everything that is compared, by name."""
    modes = {mode: (lambda mode=mode: wb.profile(lm.model, importance=mode)) for mode in ("off", "decode", "window", "full")}
    return {
        **{f"wb.profile, importance {mode}": observer for mode, observer in modes.items()},
        "torch FlopCounterMode": lambda: FlopCounterMode(display=False),
        "torch.profiler": lambda: torch.profiler.profile(),
    }


@torch.no_grad()
def decode_seconds(lm: wb.LM, prompt: torch.Tensor, steps: int, observer: Observer) -> float:
    """Seconds of `steps` decode steps after the prompt, which is not timed."""
    cache = DynamicCache(config=lm.model.config)
    lm.model(prompt, past_key_values=cache, logits_to_keep=1)
    token = prompt[:, -1:]
    with observer():
        started = time.perf_counter()
        for _ in range(steps):
            lm.model(token, past_key_values=cache, logits_to_keep=1)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


@torch.no_grad()
def prefill_seconds(lm: wb.LM, prompt: torch.Tensor, steps: int, observer: Observer) -> float:
    """Seconds of the prompt."""
    with observer():
        started = time.perf_counter()
        lm.model(prompt, use_cache=True, logits_to_keep=1)
        if lm.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started


def main() -> None:
    """Runs the pairs and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-dense")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--phase", choices=("decode", "prefill"), default="decode")
    options = parser.parse_args()
    lm = wb.load(options.model)
    prompt = torch.tensor([prompt_tokens(lm, options.context)], device=lm.device)
    measure = decode_seconds if options.phase == "decode" else prefill_seconds
    print(f"{options.phase} of {options.model} at {options.context} tokens, median of {options.pairs} pairwise ratios")
    for name, observer in observers(lm).items():
        ratios = []
        for pair in range(options.pairs + 1):
            bare = measure(lm, prompt, options.steps, nullcontext)
            observed = measure(lm, prompt, options.steps, observer)
            if pair:
                ratios.append(observed / bare)
        print(f"| {name} | {median(ratios):.3f} | {min(ratios):.3f} to {max(ratios):.3f} |", flush=True)


if __name__ == "__main__":
    main()
