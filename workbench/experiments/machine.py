"""Measures what this machine reaches: matrix products, memory, attention and small operations, by size and dtype.

The shapes are synthetic and the code is the one models run: `F.linear`, transformers' norm, rotary positions and
attention, the engine's attention. Every time is the shortest of several: other work on the machine only ever adds to it.
What the pieces miss is measured on random models. The share of a core this process got is kept with the sheet, so that a
sheet of a busy machine can be told from one of a machine that was left alone.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb, eager_attention_forward

from workbench.cost.flops import attention_flops, linear_flops
from workbench.cost.hardware import THIS_MACHINE, Hardware, this_machine_file
from workbench.cost.rates import ATTENTION, PASSES, Grid, Rates
from workbench.cost.roofline import predict
from workbench.models.anatomy import anatomy_of
from workbench.probes.environment import environment
from workbench.trace.anatomy import Attention, Linear
from workbench.trace.pairs import causal_pairs
from workbench_kernels.attention_rows import blockwise_attention
from workbench_kernels.decode_attention import decode_attention

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

Progress = Callable[[str, int, int], None]

_MIB = 2**20
_SHORT = 16
"""Tokens before a decode step."""
_LEAST_SLOWDOWN = 0.5
_LEAST_TIMES = 4
_NO_SLOWDOWN = Grid(((1,), (1,)), (1.0,))
_WORTH_USING = 1 / 8
"""A dtype whose products are slower than this share of float32's is emulated, and left out."""


@dataclass(frozen=True)
class Sizes:
    """Which sizes are measured, and how long each for."""

    rows: tuple[int, ...] = (1, 16, 128, 1024)
    features: tuple[int, ...] = (256, 1024, 4096)
    reads_mib: tuple[int, ...] = (1, 16, 64, 512)
    elements: tuple[int, ...] = (2**8, 2**14, 2**18, 2**20, 2**22)
    head_dims: tuple[int, ...] = (16, 64, 256)
    queries: tuple[int, ...] = (64, 256, 1024, 2048)
    keys: tuple[int, ...] = (64, 512, 4096)
    layers: tuple[int, int] = (2, 8)
    hidden_sizes: tuple[int, ...] = (128, 512, 1024)
    tokens: tuple[int, ...] = (1, 128, 512, 2048)
    seconds: float = 0.05


FULL = Sizes()
FULL_GPU = Sizes(
    rows=(1, 16, 128, 1024, 8192),
    features=(256, 1024, 4096, 8192),
    queries=(64, 256, 1024, 4096),
    hidden_sizes=(512, 2048, 4096),
    tokens=(1, 128, 1024, 4096),
    seconds=0.03,
)
"""A GPU needs larger work to be busy, and less time for each."""

QUICK = Sizes(
    rows=(1, 16),
    features=(64, 128),
    reads_mib=(1, 2),
    elements=(2**8, 2**10),
    head_dims=(16,),
    queries=(16,),
    keys=(16,),
    layers=(1, 2),
    hidden_sizes=(16, 64),
    tokens=(1, 8),
    seconds=0.0,
)
"""Enough to run through everything in seconds; the numbers mean little."""


@torch.no_grad()
def measure_machine(
    sizes: Sizes | None = None, *, device: str | torch.device | None = None, on_progress: Progress | None = None
) -> Hardware:
    """Measures this machine and returns its sheet, under the name `this-machine`. Takes less than a minute on two cores.

    Args:
        sizes: what to measure; `QUICK` runs through in seconds.
        device: None is the first CUDA GPU, or the CPU.
        on_progress: called with a dtype, steps done and steps in all.
    """
    place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    sizes = sizes or (FULL_GPU if place.type == "cuda" else FULL)
    rates: dict[str, Rates] = {}
    skipped: list[str] = []
    started = time.perf_counter(), time.process_time()
    for name, dtype in DTYPES.items():
        bench = _Bench(place, dtype, sizes)
        if name != "fp32" and not bench.worth_using():
            skipped.append(name)
            continue
        rates[name] = bench.rates(lambda done, total, name=name: on_progress and on_progress(name, done, total))
    peaks = {name: max(each.products.rates) for name, each in rates.items()}
    bandwidth = rates["fp32"].reads.rates[-1]
    return Hardware(
        THIS_MACHINE,
        _label(place),
        peaks,
        bandwidth,
        _memory_bytes(place),
        _on_chip_bytes(place),
        ("measured by `workbench doctor --calibrate`",),
        f"Left out as emulated: {', '.join(skipped)}." if skipped else "",
        rates,
        {**environment(), "device": place.type, "cpu_share": _cpu_share(*started)},
    )


def store(sheet: Hardware) -> Path:
    """Keeps the sheet as `this-machine`, in place of an earlier one."""
    path = this_machine_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(sheet.to_dict(), indent=1))
    os.replace(temporary, path)
    return path


class _Bench:
    """Measurements of one dtype on one device."""

    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: Sizes):
        self.device, self.dtype, self.sizes = device, dtype, sizes

    def worth_using(self) -> bool:
        """Whether products in this dtype come near those in float32."""
        middle = self.sizes.features[len(self.sizes.features) // 2]
        linear, rows = Linear("", middle, middle), self.sizes.rows[-1]
        plain = _Bench(self.device, torch.float32, self.sizes)
        return self._product(rows, linear) > _WORTH_USING * plain._product(rows, linear)

    def rates(self, advance: Callable[[int, int], Any]) -> Rates:
        """Everything, point by point."""
        sizes = self.sizes
        shapes = [(rows, i, o) for rows in sizes.rows for i in sizes.features for o in sizes.features]
        calls = {kind: [(dim, size) for dim in sizes.head_dims for size in self._lengths(kind)] for kind in ATTENTION}
        total = len(shapes) + len(sizes.reads_mib) + len(PASSES) * len(sizes.elements) + sum(map(len, calls.values())) + 1
        done = 0

        def grid(axes: list[tuple], measured: Iterator[float]) -> Grid:
            nonlocal done
            values = []
            for value in measured:
                values.append(value)
                done += 1
                advance(done, total)
            return Grid(tuple(tuple(axis) for axis in axes), tuple(values))

        measured = Rates(
            products=grid(
                [sizes.rows, sizes.features, sizes.features], (self._product(r, Linear("", i, o)) for r, i, o in shapes)
            ),
            reads=grid([tuple(mib * _MIB for mib in sizes.reads_mib)], (self._read(mib * _MIB) for mib in sizes.reads_mib)),
            passes={
                kind: grid([sizes.elements], (self._pass(kind, elements) for elements in sizes.elements)) for kind in PASSES
            },
            attention={
                kind: grid([sizes.head_dims, self._lengths(kind)], (self._attention(kind, *call) for call in calls[kind]))
                for kind in ATTENTION
            },
            step_s=0.0,
            layer_s=0.0,
            slowdown=_NO_SLOWDOWN,
        )
        complete = self._with_slowdown(self._with_overhead(measured))
        advance(total, total)
        return complete

    def seconds(self, call: Callable[[], Any]) -> float:
        """Seconds of one call: the shortest of several, after one that is not counted."""
        call()
        times = []
        until = time.perf_counter() + self.sizes.seconds
        while len(times) < _LEAST_TIMES or time.perf_counter() < until:
            times.append(self._timed(call))
        return min(times)

    def _timed(self, call: Callable[[], Any]) -> float:
        if self.device.type != "cuda":
            started = time.perf_counter()
            call()
            return time.perf_counter() - started
        repeats = 8  # back to back, as a model's operations are: a lone call would measure the wait for its launch
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        begin.record()
        for _ in range(repeats):
            call()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3 / repeats

    def _random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, device=self.device).to(self.dtype)

    def _product(self, rows: int, linear: Linear) -> float:
        x, weight = self._random(1, rows, linear.in_features), self._random(linear.out_features, linear.in_features)
        return linear_flops(rows, linear) / self.seconds(lambda: F.linear(x, weight))

    def _read(self, nbytes: int) -> float:
        features = 1024
        weights = self._random(nbytes // features // self.dtype.itemsize, features)
        x = self._random(1, features)
        return weights.nbytes / self.seconds(lambda: F.linear(x, weights))

    def _pass(self, kind: str, elements: int) -> float:
        features = min(elements, 1024)
        x, y = self._random(1, elements // features, features), self._random(1, elements // features, features)
        calls: dict[str, Callable[[], Any]] = {
            "silu": lambda: F.silu(x) * y,
            "gelu": lambda: F.gelu(x, approximate="tanh") * y,
            "add": lambda: x + y,
            "copy": lambda: torch.cat([x, y[:, :0]], dim=1),
        }
        if kind == "norm":
            norm = LlamaRMSNorm(features).to(self.device, self.dtype)
            calls["norm"] = lambda: norm(x)
        if kind == "rotary":
            dim = min(64, features // 4)
            heads = x.view(1, -1, features // dim, dim).transpose(1, 2)
            query, key = heads[:, : -(features // dim // 4)], heads[:, -(features // dim // 4) :]
            angles = self._random(1, elements // features, dim)
            calls["rotary"] = lambda: apply_rotary_pos_emb(query, key, angles, angles)
        return elements / self.seconds(calls[kind])

    def _lengths(self, kind: str) -> tuple[int, ...]:
        return self.sizes.keys if kind in {"cached", "decode"} else self.sizes.queries

    def _attention(self, kind: str, head_dim: int, size: int) -> float:
        attention = Attention(num_q_heads=8, num_kv_heads=2, head_dim=head_dim, value_dim=head_dim)
        one = kind in {"cached", "decode"}
        queries = 1 if one else size
        query = self._random(1, attention.num_q_heads, queries, head_dim)
        key, value = (self._random(1, attention.num_kv_heads, size, head_dim) for _ in range(2))
        module = SimpleNamespace(num_key_value_groups=attention.group, is_causal=True, training=False)
        hidden = torch.ones(queries, size, dtype=torch.bool, device=self.device).triu(size - queries + 1)
        mask = torch.zeros(1, 1, queries, size, device=self.device, dtype=self.dtype).masked_fill(
            hidden, torch.finfo(self.dtype).min
        )
        scaling, window = head_dim**-0.5, max(1, size // 2)
        sdpa = AttentionInterface._global_mapping["sdpa"]
        calls: dict[str, Callable[[], Any]] = {
            "causal": lambda: sdpa(module, query, key, value, None, scaling=scaling),
            "masked": lambda: sdpa(module, query, key, value, ~hidden[None, None], scaling=scaling),
            "cached": lambda: sdpa(module, query, key, value, None, scaling=scaling),
            "eager": lambda: eager_attention_forward(module, query, key, value, mask, scaling=scaling),
            "blockwise": lambda: blockwise_attention(query, key, value, scaling, window=window),
            "decode": lambda: decode_attention(query, key, value, scaling),
        }
        pairs = {"causal": causal_pairs(size, size), "blockwise": causal_pairs(size, size, window)}.get(kind, queries * size)
        return attention_flops(pairs, attention) / self.seconds(calls[kind])

    def _with_overhead(self, rates: Rates) -> Rates:
        """Adds what a decode step of a small random model costs beside its pieces, split into step and layer."""
        beside = []
        for num_layers in self.sizes.layers:
            model = self._model(num_layers, hidden_size=256)
            beside.append(self._model_seconds(model, 1) - self._pieces(rates, model, 1))
        few, many = self.sizes.layers
        layer_s = max(0.0, (beside[1] - beside[0]) / (many - few))
        return replace(rates, layer_s=layer_s, step_s=max(0.0, beside[0] - few * layer_s))

    def _with_slowdown(self, rates: Rates) -> Rates:
        """Adds how much longer the pieces take inside random models of several sizes than alone."""
        num_layers = self.sizes.layers[0]
        models = [self._model(num_layers, hidden_size) for hidden_size in self.sizes.hidden_sizes]
        overhead = rates.step_s + num_layers * rates.layer_s
        factors = []
        for tokens, model in itertools.product(self.sizes.tokens, models):
            measured = self._model_seconds(model, tokens) - overhead
            factors.append(max(_LEAST_SLOWDOWN, measured / self._pieces(rates, model, tokens)))
        return replace(rates, slowdown=Grid((self.sizes.tokens, self.sizes.hidden_sizes), tuple(factors)))

    def _model_seconds(self, model: torch.nn.Module, tokens: int) -> float:
        """Seconds of a prefill of `tokens`, or of a decode step where that is one."""
        ids = torch.ones(1, max(tokens, _SHORT), dtype=torch.long, device=self.device)
        if tokens > 1:
            return self.seconds(lambda: model(ids, past_key_values=DynamicCache(config=model.config), logits_to_keep=1))
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        return self.seconds(lambda: model(ids[:, :1], past_key_values=cache, logits_to_keep=1))

    def _pieces(self, rates: Rates, model: torch.nn.Module, tokens: int) -> float:
        """Predicted seconds of the same without anything beside the pieces."""
        name = next(name for name, dtype in DTYPES.items() if dtype == self.dtype)
        alone = replace(rates, step_s=0.0, layer_s=0.0, slowdown=_NO_SLOWDOWN)
        sheet = Hardware("", "", {name: 1.0}, 1.0, 1, 1, (), rates={name: alone})
        sizes = {"context": _SHORT, "new_tokens": 1} if tokens == 1 else {"context": tokens, "new_tokens": 0}
        return float(predict(anatomy_of(model), sheet, dtype=name, **sizes).phases["predicted_s"].iloc[-1])

    def _model(self, num_layers: int, hidden_size: int) -> torch.nn.Module:
        config = LlamaConfig(
            hidden_size=hidden_size,
            intermediate_size=3 * hidden_size,
            num_hidden_layers=num_layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=8 * hidden_size,
            max_position_embeddings=2**20,
        )
        return AutoModelForCausalLM.from_config(config).to(self.device, self.dtype).eval()


def _cpu_share(wall: float, cpu: float) -> float:
    """CPU seconds this process got in each second since. Well below one, it had to wait for others."""
    return (time.process_time() - cpu) / (time.perf_counter() - wall)


def _label(device: torch.device) -> str:
    facts = environment()
    if device.type == "cuda":
        return f"this machine ({torch.cuda.get_device_name(device)})"
    return f"this machine ({facts['processor']}, {facts['threads']} threads)"


def _memory_bytes(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _on_chip_bytes(device: torch.device) -> int:
    """Shared memory of a multiprocessor, or the second-level cache of a core: a mebibyte where the system does not say."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    size = Path("/sys/devices/system/cpu/cpu0/cache/index2/size")
    units = {"K": 2**10, "M": 2**20}
    text = size.read_text().strip() if size.exists() else "1M"
    return int(text[:-1]) * units[text[-1]]
