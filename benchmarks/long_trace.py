"""A trace of about a million rows, made without running a model: a long generation of a large model under H2O.

usage: python benchmarks/long_trace.py FOLDER [--steps 8000]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from transformers import LlamaConfig

import workbench as wb
from workbench.cost.plan import table_of
from workbench.trace.schema import FORMAT_VERSION, TABLES

LAYERS, HEADS, PROMPT, HELD = 32, 8, 4096, 1024


def long_trace(steps: int) -> wb.Trace:
    """A prompt and `steps - 1` decoded tokens: four rows a step and layer, in the tables that are longest in real runs."""
    config = LlamaConfig(
        hidden_size=4096, num_hidden_layers=LAYERS, num_attention_heads=32, num_key_value_heads=HEADS, dtype="bfloat16"
    )
    step = np.arange(steps)
    tokens = np.where(step == 0, PROMPT, 1)
    ones = np.ones(steps, int)
    tables = {name: schema.empty_table() for name, schema in TABLES.items()}
    tables["steps"] = table_of(
        "steps",
        {
            "step": step,
            "phase": ["prefill", *["decode"] * (steps - 1)],
            "batch": ones,
            "tokens": tokens,
            "context": PROMPT + step,
            "logits": ones,
            "padding_mask": np.zeros(steps, bool),
            "start_ns": step * 1_000_000,
            "duration_ns": ones * 1_000_000,
            "setup": ["h2o(budget=0.25)"] * steps,
        },
    )
    each, layer = np.repeat(step, LAYERS), np.tile(np.arange(LAYERS), steps)
    some = np.ones(len(each), int)
    where = {"step": each, "layer": layer}
    attention = {"batch": some, "q_len": tokens[each], "kv_read": some * HELD, "kv_held": some * HELD, "pairs": some * HELD}
    kinds = {"kernel": ["decode"] * len(each), "mask": ["causal"] * len(each)}
    tables["attention"] = table_of("attention", {**where, **attention, **kinds})
    held_bytes = some * HELD * HEADS * 2 * 128 * 2
    held = {"held_tokens": some * HELD * HEADS, "physical_bytes": held_bytes, "nominal_bytes": held_bytes}
    evicting = {"op": ["evict"] * len(each), "op_tokens": some * HEADS, "extra_flops": some * 1000, "extra_bytes": some}
    both = {**where, **held, **evicting}
    tables["cache"] = table_of("cache", {name: np.concatenate([column, column]) for name, column in both.items()})
    head, position, nowhere = each % HEADS, (each * HEADS + layer) % PROMPT, -some
    tables["evictions"] = table_of("evictions", {**where, "row": 0 * some, "head": head, "position": position, "into": nowhere})
    text = PROMPT + steps - 1
    phases = ["prefill"] * PROMPT + ["decode"] * (steps - 1)
    number = np.arange(text)
    written = {"step": np.maximum(number - PROMPT + 1, 0), "row": 0 * number, "position": number, "id": number % 100}
    tables["tokens"] = table_of("tokens", {**written, "text": ["token"] * text, "phase": phases})
    meta = {"format_version": FORMAT_VERSION, "complete": True, "anatomy": wb.anatomy(config).to_dict(), "swaps": []}
    return wb.Trace({**meta, "setup": "h2o(budget=0.25)"}, tables)


def main() -> None:
    """Writes one and says how long it is."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=8000)
    options = parser.parse_args()
    trace = long_trace(options.steps)
    print(f"{trace.save(options.folder)}: {sum(trace.arrow(name).num_rows for name in TABLES):,} rows")


if __name__ == "__main__":
    main()
