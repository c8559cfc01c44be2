"""The tables of a trace. Integers are nanoseconds, bytes or counts; the unit is in the name.

A row is a fact about one forward call (`step`), one layer of it, or one token. `run` and `rank` are added by
`Trace.merge` where several traces are put together.
"""

from __future__ import annotations

import pyarrow as pa

FORMAT_VERSION = 2

_INT, _FLOAT, _TEXT = pa.int64(), pa.float64(), pa.string()
HALF_FLOATS = pa.list_(pa.float16())

TABLES: dict[str, pa.Schema] = {
    # One forward call. `tokens` = batch x new tokens a row; `logits` = positions the output head computed; `padding_mask` =
    # whether the call was given a mask of which tokens are padding.
    "steps": pa.schema(
        [
            ("step", _INT),
            ("phase", _TEXT),
            ("batch", _INT),
            ("tokens", _INT),
            ("context", _INT),
            ("logits", _INT),
            ("padding_mask", pa.bool_()),
            ("start_ns", _INT),
            ("duration_ns", _INT),
            ("device_ns", _INT),
            ("setup", _TEXT),
        ]
    ),
    # One layer's attention. `pairs` = visible query-key pairs of one query head over the batch; batch x q_len x kv_read
    # is what a kernel that ignores the mask computes.
    "attention": pa.schema(
        [
            ("step", _INT),
            ("layer", _INT),
            ("batch", _INT),
            ("q_len", _INT),
            ("kv_read", _INT),
            ("kv_held", _INT),
            ("pairs", _INT),
            ("kernel", _TEXT),
            ("mask", _TEXT),
        ]
    ),
    # One operation on one layer's cache: tokens appended, the method's turn to evict (`due`), eviction, more held than a decode
    # step may read (`select`), scoring, keys turned to stand by slot (`place`) and so on. `held_tokens` = slots that hold a
    # token, summed over batch rows and kv heads.
    "cache": pa.schema(
        [
            ("step", _INT),
            ("layer", _INT),
            ("op", _TEXT),
            ("op_tokens", _INT),
            ("held_tokens", _INT),
            ("physical_bytes", _INT),
            ("nominal_bytes", _INT),
            ("extra_flops", _INT),
            ("extra_bytes", _INT),
        ]
    ),
    # One token dropped (into = -1) or merged into another. head = -1: every kv head of the layer.
    "evictions": pa.schema(
        [("step", _INT), ("row", _INT), ("layer", _INT), ("head", _INT), ("position", _INT), ("into", _INT)]
    ),
    "routing": pa.schema([("step", _INT), ("layer", _INT), ("expert", _INT), ("tokens", _INT), ("weight_sum", _FLOAT)]),
    # Where one token went: its experts (-1: dropped) and their weights, and, if asked for, the logits of the router over all.
    "choices": pa.schema(
        [
            ("step", _INT),
            ("layer", _INT),
            ("row", _INT),
            ("position", _INT),
            ("experts", pa.list_(pa.int32())),
            ("weights", pa.list_(pa.float32())),
            ("logits", pa.list_(pa.float32())),
        ]
    ),
    # What a routing method computed in one layer. `changed` = tokens for which it was something else than the model would have;
    # FLOPs and bytes, where given, stand in for those that follow from shapes, or come on top where the component is `method`;
    # `weight_bytes` = the part of `bytes` that are weights. Layer -1: of another model that a decoding method runs beside it.
    "work": pa.schema(
        [
            ("step", _INT),
            ("layer", _INT),
            ("component", _TEXT),
            ("changed", _INT),
            ("flops", _INT),
            ("bytes", _INT),
            ("weight_bytes", _INT),
        ]
    ),
    # One bit plane of an expert that a step had to read, under a routing method with nested bits. `bits` = the width that it
    # completes, `tokens` = those given this width or more, `plane_bytes` = its codes and scales.
    "planes": pa.schema(
        [
            ("step", _INT),
            ("layer", _INT),
            ("expert", _INT),
            ("bits", _INT),
            ("tokens", _INT),
            ("plane_bytes", _INT),
        ]
    ),
    # Calls of a module the anatomy cannot place, counted by torch's dispatch-mode counter.
    "unattributed": pa.schema([("step", _INT), ("module", _TEXT), ("flops", _INT)]),
    # Attention mass by key position of one query head; `window` = queries whose attention was summed, `step` the last of
    # them; the mass is that of `length` positions from `start` on. With `top_positions` given, `mass` holds sums over equal
    # stretches of them, the top ones left out.
    "importance": pa.schema(
        [
            ("step", _INT),
            ("row", _INT),
            ("layer", _INT),
            ("head", _INT),
            ("window", _INT),
            ("start", _INT),
            ("length", _INT),
            ("mass", HALF_FLOATS),
            ("top_positions", pa.list_(pa.int32())),
            ("top_mass", HALF_FLOATS),
        ]
    ),
    # A part of a forward call. `device_ns` = the GPU's own time, null off the GPU; spans of a layer lie inside its own.
    "spans": pa.schema(
        [("step", _INT), ("name", _TEXT), ("layer", _INT), ("start_ns", _INT), ("duration_ns", _INT), ("device_ns", _INT)]
    ),
    "tokens": pa.schema(
        [
            ("step", _INT),
            ("row", _INT),
            ("position", _INT),
            ("id", _INT),
            ("text", _TEXT),
            ("logprob", _FLOAT),
            ("entropy", _FLOAT),
            ("phase", _TEXT),
        ]
    ),
    # One sample of one GPU, on the clock of `start_ns`. `used_bytes`, power, energy (a counter) and utilisation are the whole
    # GPU's, whoever uses it; allocated and reserved bytes are those of this process' torch. `util_percent` is the time some
    # kernel ran. `reason` reads "column, column: why; column: why", or only "why" in a row that holds no value at all.
    "device": pa.schema(
        [
            ("t_ns", _INT),
            ("device", _TEXT),
            ("energy_mj", _INT),
            ("power_mw", _INT),
            ("used_bytes", _INT),
            ("allocated_bytes", _INT),
            ("reserved_bytes", _INT),
            ("util_percent", _INT),
            ("memory_util_percent", _INT),
            ("clock_mhz", _INT),
            ("memory_clock_mhz", _INT),
            ("reason", _TEXT),
        ]
    ),
}

REHEARSAL = "rehearsal"
"""Tokens run after a prompt so that a method may see what they look at, and taken out of the cache again."""

DRAFT, VERIFY, CATCH_UP = "draft", "verify", "catch-up"
"""Under a decoding method: a token that something smaller than the model computes, tokens that the model reads and may take
back, and tokens of the text that one of two models had not read."""

PHASES = ("prefill", REHEARSAL, "append", "decode", DRAFT, VERIFY, CATCH_UP)

ENERGY_PERIOD_S = 0.1
"""NVML's energy counter moves about every 100 ms.

Source: https://ml.energy/blog/energy/measurement/thermally-stable-profiling-for-accurate-gpu-energy-measurement.
"""
ENERGY_PERIODS = 10
"""A stretch of fewer periods is not measured: the counter would be off by more than a tenth."""


def phase_of(q_len: int, past: int) -> str:
    """Which phase a forward call of `q_len` new tokens after `past` cached ones belongs to."""
    if past == 0:
        return "prefill"
    return "decode" if q_len == 1 else "append"
