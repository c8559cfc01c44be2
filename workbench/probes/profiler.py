"""`wb.profile(model)`: records a trace of any Hugging Face causal LM, however it is called."""

from __future__ import annotations

import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from transformers import Cache, PreTrainedTokenizerBase

from workbench.models.anatomy import anatomy_of
from workbench.probes.attention import AttentionProbe, visible_pairs
from workbench.probes.device import device_sampler
from workbench.probes.environment import environment
from workbench.probes.importance import ImportanceLog, attention_mass, check_mode, observes
from workbench.probes.moe import RoutingProbe, routing_rows
from workbench.probes.traffic import eager_traffic
from workbench.probes.unplaced import UnplacedProbe
from workbench.trace.schema import phase_of
from workbench.trace.store import TraceWriter
from workbench.trace.trace import Trace
from workbench.trace.traffic import regime

_STEPS_HELD = 64
"""Steps whose device tensors may wait before they are fetched in one go."""


class Profile:
    """Observes a model between `__enter__` and `__exit__`. Afterwards `trace` holds what was recorded."""

    def __init__(
        self,
        model: nn.Module,
        importance: str = "off",
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        out: str | Path | None = None,
        device_period_s: float | None = None,
    ):
        self.model = model
        self.importance = check_mode(importance)
        self.tokenizer = tokenizer
        self.anatomy = anatomy_of(model)
        self._devices = device_sampler(model, device_period_s)
        meta = {
            "anatomy": self.anatomy.to_dict(),
            "setup": "dense",
            "environment": environment(),
            "clock": "perf_counter_ns",
            "importance": importance,
            "device_period_s": self._devices.period_s,
        }
        self._writer = TraceWriter(meta, Path(out) if out is not None else None)
        self._attention = AttentionProbe(model, self._on_attention)
        self._routing = RoutingProbe(model)
        self._unplaced = UnplacedProbe(model)
        self._handles: list[Any] = []
        self._pending: list[_Step] = []
        self._regimes: set[str] = set()
        self._importance = ImportanceLog(self._writer)
        self._step: _Step | None = None
        self._num_steps = 0
        self._own_ns = 0

    def __enter__(self) -> Profile:
        try:
            self._attention.attach()
            self._routing.attach()
            self._unplaced.attach()
            head = self.model.get_output_embeddings()
            self._handles = [
                self.model.register_forward_pre_hook(self._before_step, with_kwargs=True, prepend=True),
                self.model.register_forward_hook(self._after_step, with_kwargs=True),
                head.register_forward_pre_hook(self._before_head),
            ]
            self._devices.start()
        except BaseException:
            self._detach()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._detach()
        self._devices.stop()
        self._resolve()
        self._importance.flush()
        self._writer.meta |= self._derived()
        overhead = {"own_ns": self._own_ns, "how": "time spent inside the probes' own hooks, summed"}
        self._writer.close(own_overhead=overhead, **({"error": repr(error)} if error else {}))

    @property
    def trace(self) -> Trace:
        """What was recorded so far."""
        self._resolve()
        self._importance.flush()
        return Trace(self._writer.meta | self._derived(), self._writer.tables())

    def _derived(self) -> dict[str, Any]:
        """What a trace's meta says once the run is over."""
        traffic = eager_traffic(self.model, self._regimes)
        return {"eager_traffic": traffic, "importance_pooling": self._importance.meta()}

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._unplaced.detach()
        self._routing.detach()
        self._attention.detach()

    def _before_step(self, model: nn.Module, args: tuple, kwargs: dict) -> None:
        own = time.perf_counter_ns()
        ids = kwargs.get("input_ids", args[0] if args else None)
        entering = ids if ids is not None else kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = int(cache.get_seq_length()) if isinstance(cache, Cache) else 0
        self._routing.take()
        self._unplaced.take()
        self._step = _Step(self._num_steps, entering.shape[0], entering.shape[1], past, ids, kwargs.get("attention_mask"))
        self._num_steps += 1
        self._step.start_ns = time.perf_counter_ns()
        self._own_ns += self._step.start_ns - own

    def _before_head(self, head: nn.Module, args: tuple) -> None:
        if self._step is not None:
            self._step.logits = args[0].shape[:-1].numel()

    def _on_attention(self, layer: int, module: nn.Module, query, key, mask, options: dict) -> None:
        own = time.perf_counter_ns()
        step = self._step
        if step is None:
            return
        batch, _, q_len, _ = query.shape
        kv_read = key.shape[2]
        counted = step.pairs.get((id(mask), kv_read))
        if counted is None:
            counted = step.pairs[id(mask), kv_read] = visible_pairs(q_len, kv_read, batch, mask)
            step.masks.append(mask)
        kind = "causal" if mask is None else "padded or sliding"
        step.attention.append((layer, batch, q_len, kv_read, counted, self._attention.implementation, kind))
        if observes(self.importance, q_len):
            step.importance.append((layer, *self._mass(layer, query, key, mask, options)))
        self._own_ns += time.perf_counter_ns() - own

    def _mass(self, layer: int, query, key, mask, options: dict) -> tuple[torch.Tensor, int]:
        step = self._step
        written = step.past + step.q_len
        if key.shape[2] > written:
            key, mask = key[:, :, :written], None if mask is None else mask[..., :written]
        occupied = asking = None
        if mask is not None:
            seen = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
            occupied = seen[:, :1].any(2).expand(key.shape[:3])
        if step.mask is not None and step.mask.ndim == 2:
            asking = step.mask[:, -step.q_len :].bool()
        return attention_mass(
            self.importance,
            query,
            key,
            options.get("scaling") or query.shape[-1] ** -0.5,
            asking=asking,
            occupied=occupied,
            window=self.anatomy.layers[layer].attention.window,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )

    def _after_step(self, model: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        own = time.perf_counter_ns()
        step, self._step = self._step, None
        if step is None:
            return
        if step.device.type == "cuda":
            torch.cuda.synchronize(step.device)
            own = time.perf_counter_ns()
        step.duration_ns = own - step.start_ns
        cache = getattr(output, "past_key_values", None) or kwargs.get("past_key_values")
        step.cache = _cache_facts(cache) if isinstance(cache, Cache) else []
        step.routing = self._routing.take()
        step.unplaced = self._unplaced.take()
        self._pending.append(step)
        if len(self._pending) >= _STEPS_HELD:
            self._resolve()
        self._own_ns += time.perf_counter_ns() - own

    def _resolve(self) -> None:
        """Turns what waits into rows; the only place where device tensors are fetched."""
        pending, self._pending = self._pending, []
        for step in pending:
            self._write(step)
        self._writer.extend("routing", routing_rows([(step.number, step.routing) for step in pending]))
        self._writer.extend("device", self._devices.rows())
        self._writer.flush(everything=self._writer.directory is not None)

    def _write(self, step: _Step) -> None:
        add = self._writer.add
        tokens = step.batch * step.q_len
        phase = phase_of(step.q_len, step.past)
        context = step.past + step.q_len
        self._regimes.add(regime(phase, step.batch, step.mask is not None))
        add(
            "steps",
            step.number,
            phase,
            step.batch,
            tokens,
            context,
            step.logits,
            step.mask is not None,
            step.start_ns,
            step.duration_ns,
            None,
            "dense",
        )
        for layer, batch, q_len, kv_read, pairs, kernel, kind in step.attention:
            held = kv_read if step.cache else 0
            add("attention", step.number, layer, batch, q_len, kv_read, held, int(pairs), kernel, kind)
        for layer in sorted(set(range(self.anatomy.num_layers)) - {row[0] for row in step.attention}):
            self._write_unseen_attention(step, layer)
        for layer, held, physical_bytes in step.cache:
            attention = self.anatomy.layers[layer].attention
            a_token = attention.cached_elements * self.anatomy.element_bytes
            nominal = step.batch * context * a_token
            add("cache", step.number, layer, "append", tokens, held, physical_bytes, nominal, 0, 0)
        self._writer.extend("unattributed", ((step.number, *call) for call in step.unplaced))
        for layer, mass, window in step.importance:
            start = step.past + step.q_len - mass.shape[-1]
            self._importance.add(step.number, layer, start, mass, window, phase == "decode")
        self._write_tokens(step, phase)

    def _write_unseen_attention(self, step: _Step, layer: int) -> None:
        """A layer whose attention does not go through transformers' interface: counted from the sizes of the call."""
        context = step.past + step.q_len
        pairs = visible_pairs(step.q_len, context, step.batch, None)
        held = context if step.cache else 0
        row = (step.batch, step.q_len, context, held, pairs, "of the model's own", "assumed causal")
        self._writer.add("attention", step.number, layer, *row)

    def _write_tokens(self, step: _Step, phase: str) -> None:
        if step.ids is None:
            return
        mask = step.mask
        for row, ids in enumerate(step.ids.tolist()):
            padding = 0
            if mask is not None and mask.ndim == 2:
                padding = int((mask[row] == 0).sum())
            for offset, token in enumerate(ids):
                position = step.past + offset - padding
                if position >= 0:
                    text = self.tokenizer.decode([token]) if self.tokenizer is not None else None
                    self._writer.add("tokens", step.number, row, position, token, text, None, None, phase)


class _Step:
    """What is known of one forward call, some of it still on the device."""

    def __init__(self, number: int, batch: int, q_len: int, past: int, ids: torch.Tensor | None, mask: Any):
        self.number, self.batch, self.q_len, self.past = number, batch, q_len, past
        self.ids = ids
        self.device = ids.device if ids is not None else torch.device("cpu")
        self.mask = mask if isinstance(mask, torch.Tensor) else None
        self.logits = 0
        self.start_ns = self.duration_ns = 0
        self.attention: list[tuple] = []
        self.cache: list[tuple[int, int, int]] = []
        self.routing: list[tuple] = []
        self.unplaced: list[tuple[str, int]] = []
        self.importance: list[tuple] = []
        self.pairs: dict[tuple[int, int], int | torch.Tensor] = {}
        self.masks: list[torch.Tensor | None] = []


def profile(
    model: nn.Module,
    importance: str = "off",
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    device_period_s: float | None = None,
) -> Profile:
    """Records a trace of everything a model does inside the `with` block.

    Args:
        model: any `transformers` causal LM; it may be called by `forward`, `generate` or a loop of your own.
        importance: `off`; `decode` (attention mass of each decoded token); `window` (of the last 32 queries of a prompt
            too); `full` (of all queries).
        tokenizer: writes tokens as text into the trace.
        out: directory to stream the trace to; a killed process leaves a readable trace there.
        device_period_s: seconds between samples of the GPUs. None is 0.1 for a model on CUDA and no sampling elsewhere; a
            model off CUDA with a period has every GPU sampled that NVML lists; `math.inf` switches it off.

    Raises:
        UserError: if the model is no causal LM, its attention cannot be observed, or the period is none.
    """
    return Profile(model, importance, tokenizer=tokenizer, out=out, device_period_s=device_period_s)


def _cache_facts(cache: Cache) -> list[tuple[int, int, int]]:
    """Layer, held tokens (over rows and kv heads) and bytes really allocated, for every layer of a cache."""
    facts = []
    for index, layer in enumerate(cache.layers):
        if hasattr(layer, "physical_bytes"):
            facts.append((index, layer.held_tokens, layer.physical_bytes))
        elif isinstance(getattr(layer, "keys", None), torch.Tensor):
            allocated = sum(tensor.untyped_storage().nbytes() for tensor in (layer.keys, layer.values))
            facts.append((index, layer.keys.shape[:3].numel(), allocated))
    return facts
