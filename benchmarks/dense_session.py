"""Dense through the engine against plain `generate()`: time per decoded token, pair by pair.

usage: python benchmarks/dense_session.py [--model tiny-dense] [--context 2048] [--new-tokens 64] [--pairs 7]

Both decode the same tokens after the same prompt, greedily, in turns within one process; the first pair is a warm-up. The
prompt is timed with them. Prints the median seconds of each and the median of the pairwise ratios (below 1: the session is
the faster).
"""

from __future__ import annotations

import argparse
import time
from statistics import median

import torch

import workbench as wb
from workbench.workloads.plain_text import prompt_tokens


def plain(lm: wb.LM, prompt: torch.Tensor, new_tokens: int) -> tuple[float, list[int]]:
    """Seconds and tokens of transformers' own generate."""
    started = time.perf_counter()
    out = lm.model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        do_sample=False,
        pad_token_id=lm.pad_token,
    )
    return time.perf_counter() - started, out[0, prompt.shape[1] :].tolist()


def session(lm: wb.LM, prompt: torch.Tensor, new_tokens: int) -> tuple[float, list[int]]:
    """Seconds and tokens of a dense session."""
    started = time.perf_counter()
    running = wb.Session(lm)
    running.prefill(prompt)
    ids = running.generate(new_tokens, stop_at_end=False).ids[0]
    return time.perf_counter() - started, list(ids)


def main() -> None:
    """Runs the pairs and prints the medians."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny-dense")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--pairs", type=int, default=7)
    options = parser.parse_args()
    lm = wb.load(options.model)
    prompt = torch.tensor([prompt_tokens(lm, options.context)], device=lm.device)
    ratios, times = [], {"generate": [], "session": []}
    for pair in range(options.pairs + 1):
        seconds_plain, tokens_plain = plain(lm, prompt, options.new_tokens)
        seconds_session, tokens_session = session(lm, prompt, options.new_tokens)
        same = tokens_plain == tokens_session
        if pair:
            times["generate"].append(seconds_plain)
            times["session"].append(seconds_session)
            ratios.append(seconds_session / seconds_plain)
    print(f"{options.model}, {options.context} + {options.new_tokens} tokens, {options.pairs} pairs, tokens equal: {same}")
    print(f"generate {median(times['generate']):.3f} s, session {median(times['session']):.3f} s, ratio {median(ratios):.3f}")


if __name__ == "__main__":
    main()
