"""A run that has not happened: the counts a prefill and its decode steps would leave in a trace, from an anatomy alone.

They are those of transformers with a dense cache: a sliding layer holds its window, decode reads everything held. Where there
are more than `max_steps` decode steps, one in the middle of each stretch of them stands for the others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from workbench.cost.flops import attention_flops
from workbench.cost.routing import expected_unique
from workbench.errors import UserError
from workbench.trace.anatomy import Anatomy
from workbench.trace.pairs import causal_pairs
from workbench.trace.schema import TABLES
from workbench.trace.trace import Trace

MAX_STEPS = 256
"""Decode steps of a plan, if it is not told otherwise; two at least."""

_LARGEST_COUNT = 2**62


@dataclass(frozen=True)
class Plan:
    """A planned run: `batch` rows with a prompt of `context` tokens each, then `new_tokens` decode steps."""

    anatomy: Anatomy
    batch: int
    context: int
    new_tokens: int
    max_steps: int = MAX_STEPS

    def __post_init__(self) -> None:
        for name, least in (("batch", 1), ("context", 1), ("new_tokens", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} cannot be {getattr(self, name)}; ask for {least} or more.")
        pairs = self.batch * causal_pairs(self.context, self.context)
        for layer in self.anatomy.layers:
            if attention_flops(pairs, layer.attention) > _LARGEST_COUNT:
                raise UserError(
                    f"A batch of {self.batch} with {self.context} tokens each is more than can be counted; ask for less."
                )

    @property
    def seen(self) -> list[int]:
        """Tokens of a row seen at each planned decode step, its own included."""
        return [int(np.mean(part)) for part in self._decode_contexts()]

    def trace(self) -> tuple[Trace, pd.Series]:
        """The trace such a run would leave, times left null, and how many steps each of its steps stands for."""
        decode = [(int(np.mean(part)), len(part)) for part in self._decode_contexts()]
        steps = {
            "step": np.arange(1 + len(decode)),
            "phase": ["prefill"] + ["decode"] * len(decode),
            "batch": np.full(1 + len(decode), self.batch),
            "tokens": np.array([self.batch * self.context] + [self.batch] * len(decode)),
            "context": np.array([self.context] + [context for context, _ in decode]),
            "logits": np.full(1 + len(decode), self.batch),
            "setup": ["dense"] * (1 + len(decode)),
        }
        repeats = pd.Series([1] + [count for _, count in decode], index=steps["step"])
        tables = {name: schema.empty_table() for name, schema in TABLES.items()}
        tables |= {"steps": table_of("steps", steps), "attention": table_of("attention", self._attention(steps))}
        meta = {"anatomy": self.anatomy.to_dict(), "setup": "dense", "planned": True, "complete": True}
        return Trace(meta, tables), repeats

    def experts(self, trace: Trace) -> pd.DataFrame:
        """Tokens sent to experts and experts hit, `step, layer, tokens, hit`, if every token chose independently.

        Of E experts, `t` tokens with k choices each hit `E (1 - (1 - k/E)^t)` on average. Real routers are correlated and hit
        fewer.
        """
        steps = trace.table("steps")
        parts = []
        for layer in self.anatomy.layers:
            if layer.experts is not None:
                hit = expected_unique(steps["tokens"], layer.experts.num_experts, layer.experts.top_k)
                sent = steps["tokens"] * layer.experts.top_k
                parts.append(pd.DataFrame({"step": steps["step"], "layer": layer.index, "tokens": sent, "hit": hit}))
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame(columns=["step", "layer", "tokens", "hit"])

    def _decode_contexts(self) -> list[np.ndarray]:
        """Tokens seen after each decode step, in at most `max_steps` stretches, the last step by itself."""
        contexts = np.arange(self.context + 1, self.context + self.new_tokens + 1)
        stretches = [*np.array_split(contexts[:-1], min(self.max_steps - 1, max(1, len(contexts) - 1))), contexts[-1:]]
        return [stretch for stretch in stretches if len(stretch)]

    def _attention(self, steps: dict[str, Any]) -> dict[str, Any]:
        """The table's columns, layer after layer."""
        prefill = steps["step"] == 0
        columns: dict[str, list] = {name: [] for name in TABLES["attention"].names}
        for layer in self.anatomy.layers:
            window = layer.attention.window
            read = (
                steps["context"] if window is None else np.where(prefill, steps["context"], steps["context"].clip(max=window))
            )
            slides = window is not None and self.context > window
            of_layer = {
                "step": steps["step"],
                "layer": np.full(len(prefill), layer.index),
                "batch": steps["batch"],
                "q_len": steps["tokens"] // self.batch,
                "kv_read": read,
                "kv_held": read,
                "pairs": self.batch * np.where(prefill, causal_pairs(self.context, self.context, window), read),
                "kernel": np.full(len(prefill), "sdpa"),
                "mask": np.where(prefill & slides, "padded or sliding", "causal"),
            }
            for name, values in of_layer.items():
                columns[name].append(values)
        return {name: np.concatenate(values) for name, values in columns.items()}


def table_of(name: str, columns: Mapping[str, Any]) -> pa.Table:
    """Columns as a table of a trace; those not given are null."""
    schema = TABLES[name]
    length = len(next(iter(columns.values())))
    return pa.table(
        [pa.array(columns[each.name], each.type) if each.name in columns else pa.nulls(length, each.type) for each in schema],
        schema=schema,
    )
