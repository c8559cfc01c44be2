"""Dense through the engine against plain `generate()`: time per decoded token, pair by pair.

usage: python benchmarks/dense_session.py [--model tiny-dense] [--context 2048] [--new-tokens 64] [--pairs 7]

`--model random-8x512` is a Llama with random weights (`random_model.py`).

Both decode the same tokens after the same prompt, greedily, in turns within one process; the first pair is a warm-up. Prints
the median seconds of the whole and of the decoded tokens after the first, and the medians of the pairwise ratios (below 1: the
session is the faster).
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch
from random_model import load
from transformers.generation.streamers import BaseStreamer

import workbench as wb
from workbench.workloads.plain_text import prompt_tokens


class Clock(BaseStreamer):
    """Notes when each token arrives."""

    def __init__(self):
        self.times: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        """Called with the prompt first, then with each token."""
        self.times.append(time.perf_counter())

    def end(self) -> None:
        """Nothing to do."""


def plain(lm: wb.LM, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float, list[int]]:
    """Seconds in all, seconds of decoding, and tokens of transformers' own generate."""
    clock = Clock()
    out = lm.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=lm.pad_token,
        streamer=clock,
    )
    start, first, last = clock.times[0], clock.times[1], clock.times[-1]
    return last - start, last - first, out[0, prompt.shape[1] :].tolist()


def session(lm: wb.LM, prompt: torch.Tensor, new_tokens: int) -> tuple[float, float, list[int]]:
    """The same for a dense session."""
    started = time.perf_counter()
    times: list[float] = []
    running = wb.Session(lm)
    running.prefill(prompt)
    ids = running.generate(new_tokens, on_token=lambda _: times.append(time.perf_counter()), stop_at_end=False).ids[0]
    return times[-1] - started, times[-1] - times[0], list(ids)


def main() -> None:
    """Runs the pairs and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-dense")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    lm = load(options.model, options.context + options.new_tokens)
    prompt = torch.tensor([prompt_tokens(lm, options.context)], device=lm.device)
    runs = {"generate": plain, "session": session}
    seconds = {name: {"in all": [], "decoding": []} for name in runs}
    same = True
    for pair in range(options.pairs + 1):
        tokens = {}
        for name, run in runs.items():
            in_all, decoding, tokens[name] = run(lm, prompt, options.new_tokens)
            if pair:
                seconds[name]["in all"].append(in_all)
                seconds[name]["decoding"].append(decoding)
        same &= tokens["generate"] == tokens["session"]
    print(f"{options.model}, {options.context} + {options.new_tokens} tokens, {options.pairs} pairs, tokens equal: {same}")
    for part in ("in all", "decoding"):
        generate, own = seconds["generate"][part], seconds["session"][part]
        ratio = median(mine / theirs for mine, theirs in zip(own, generate, strict=True))
        print(f"{part}: generate {median(generate):.3f} s, session {median(own):.3f} s, ratio {ratio:.3f}")


if __name__ == "__main__":
    main()
