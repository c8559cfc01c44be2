"""What cache methods gain at decode and cost at prefill: a plain loop against sessions, as ratios within one process.

usage: python benchmarks/cache_speed.py [--model random-8x512] [--context 8192] [--budget 0.125] [--new-tokens 32]
           [--rounds 3] [METHOD ...]

Methods are given in their text form without the budget, such as `snapkv` or `h2o:recent=0.3`. In every round the plain loop
of transformers, a dense session and each method read the same prompt and decode as many tokens; the first tokens are a
warm-up. The table shows medians over the rounds:

- `ms a token`: time per decoded token, and `x plain` how many times faster that is than the plain loop of the same round;
- `decision`: seconds spent deciding and evicting at the end of the prompt, as a share of the dense session's prefill of the
  same round. Seconds of the accumulated attention some methods need (h2o) count there too.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from statistics import median

import torch
from random_model import load
from transformers import DynamicCache

import workbench as wb
from workbench.engine.cache import EngineLayer
from workbench.methods import parse_method
from workbench.workloads.plain_text import prompt_tokens

METHODS = ("snapkv", "tova", "knorm", "streaming-llm", "h2o", "adakv", "duo-attention:gates=prompt")
WARM_UP = 4


@torch.no_grad()
def plain(lm: wb.LM, prompt: torch.Tensor, new_tokens: int) -> float:
    """Seconds a token of a greedy loop over transformers' own model and cache."""
    cache = DynamicCache(config=lm.model.config)
    logits = lm.model(prompt, past_key_values=cache, logits_to_keep=1).logits
    seconds = []
    for _ in range(new_tokens):
        token = logits[:, -1].argmax(-1, keepdim=True)
        started = time.perf_counter()
        logits = lm.model(token, past_key_values=cache, logits_to_keep=1).logits
        seconds.append(time.perf_counter() - started)
    return median(seconds[WARM_UP:])


@contextmanager
def timed_decisions() -> Iterator[list[float]]:
    """Seconds of each layer's share of a method, while the block runs."""
    seconds: list[float] = []
    finish = EngineLayer.finish

    def timed(*args, **options) -> None:
        started = time.perf_counter()
        finish(*args, **options)
        seconds.append(time.perf_counter() - started)

    EngineLayer.finish = timed
    try:
        yield seconds
    finally:
        EngineLayer.finish = finish


def session(lm: wb.LM, method: wb.Method | None, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float, float]:
    """Seconds of the prefill, of the decisions in it, and of a decoded token."""
    running = wb.Session(lm, method)
    started = time.perf_counter()
    with timed_decisions() as deciding:
        running.prefill(prompt)
    prefill = time.perf_counter() - started
    seconds = []
    for _ in range(new_tokens):
        started = time.perf_counter()
        running.step()
        seconds.append(time.perf_counter() - started)
    return prefill, sum(deciding), median(seconds[WARM_UP:])


def main() -> None:
    """Runs the rounds and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", default=METHODS)
    parser.add_argument("--model", default="random-8x512")
    parser.add_argument("--context", type=int, default=8192)
    parser.add_argument("--budget", type=float, default=0.125)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    lm = load(options.model, options.context + options.new_tokens)
    prompt = torch.tensor([prompt_tokens(lm, options.context)], device=lm.device)
    methods = {}
    for text in options.methods:
        knobs = f"{text}{',' if ':' in text else ':'}budget={options.budget}"
        methods[text] = parse_method(knobs)
    tokens: dict[str, list[float]] = {}
    ratios: dict[str, list[float]] = {}
    shares: dict[str, list[float]] = {}
    for _ in range(options.rounds):
        bare = plain(lm, prompt, options.new_tokens)
        tokens.setdefault("plain loop", []).append(bare)
        dense_prefill = 0.0
        for name, method in {"dense": None, **methods}.items():
            prefill, deciding, token = session(lm, method, prompt, options.new_tokens)
            dense_prefill = dense_prefill or prefill
            tokens.setdefault(name, []).append(token)
            ratios.setdefault(name, []).append(bare / token)
            shares.setdefault(name, []).append(deciding / dense_prefill)
    print(f"{options.model}, {options.context} tokens, budget {options.budget}, {options.rounds} rounds")
    print("| setup | ms a token | x plain | decision / prefill |\n| --- | --- | --- | --- |")
    for name, seconds in tokens.items():
        faster = f"{median(ratios[name]):.2f}" if name in ratios else "1"
        share = f"{median(shares[name]):.2%}" if name in methods else ""
        print(f"| {name} | {1e3 * median(seconds):.2f} | {faster} | {share} |")


if __name__ == "__main__":
    main()
