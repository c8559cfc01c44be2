"""Predicted beside measured: a profiled prompt against the calibrated sheet of this machine.

usage: workbench doctor --calibrate; python benchmarks/prediction.py [--model M] [--contexts 512 1024 2048] [--runs 3]

Each context runs once more than counted, the first time as a warm-up; the error is that of the prediction against the
median of the measured seconds.
"""

from __future__ import annotations

import argparse

import torch

import workbench as wb
from workbench.workloads.plain_text import prompt_tokens


@torch.no_grad()
def main() -> None:
    """Prints a table, one row a context."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="gemma-3-270m")
    parser.add_argument("--contexts", type=int, nargs="+", default=(512, 1024, 2048))
    parser.add_argument("--runs", type=int, default=3)
    options = parser.parse_args()
    lm = wb.load(options.model)
    print("| prompt tokens | measured, median | predicted | error |")
    print("| --- | --- | --- | --- |")
    for context in options.contexts:
        prompt = torch.tensor([prompt_tokens(lm, context)], device=lm.device)
        lm.model(prompt, logits_to_keep=1)
        with wb.profile(lm.model) as profile:
            for _ in range(options.runs):
                lm.model(prompt, logits_to_keep=1)
        row = wb.beside_measured(profile.trace).set_index("phase").loc["prefill"]
        measured, predicted = row["measured_s"], row["predicted_s"]
        print(f"| {context} | {measured:.2f} s | {predicted:.2f} s | {predicted / measured - 1:+.0%} |", flush=True)


if __name__ == "__main__":
    main()
