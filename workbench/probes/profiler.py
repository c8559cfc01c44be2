"""`wb.profile(model)`: records a trace of any Hugging Face causal LM, however it is called."""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import Cache, PreTrainedTokenizerBase

from workbench.errors import UserError
from workbench.models.anatomy import anatomy_of, attention_modules, decoder
from workbench.probes.attention import AttentionProbe, visible_pairs
from workbench.probes.counting import NestedCounts
from workbench.probes.device import device_sampler
from workbench.probes.environment import environment
from workbench.probes.importance import ImportanceLog, attention_mass, check_mode, observes
from workbench.probes.layer_check import LayerCheck
from workbench.probes.moe import RoutingProbe, choice_rows, routing_rows
from workbench.probes.observable import check_observable, refuse_compiled
from workbench.probes.spans import SpanProbe, elapsed_ns, mark, span_rows
from workbench.probes.step import Step
from workbench.probes.traffic import eager_traffic
from workbench.probes.unobserved import is_unobserved, unobserved
from workbench.probes.unplaced import UnplacedProbe
from workbench.trace.store import TraceWriter
from workbench.trace.trace import Trace
from workbench.trace.traffic import regime

_STEPS_HELD = 64
"""Steps whose device tensors may wait before they are fetched in one go."""

_PAGED = "generate_batch() packs several requests into one call over a paged cache, which is not measured; use generate()."


class Profile:
    """Observes a model between `__enter__` and `__exit__`. Afterwards `trace` holds what was recorded."""

    def __init__(
        self,
        model: nn.Module,
        importance: str = "off",
        *,
        routing: str = "load",
        spans: bool = False,
        tokenizer: PreTrainedTokenizerBase | None = None,
        out: str | Path | None = None,
        device_period_s: float | None = None,
    ):
        check_observable(model)
        self.model: nn.Module | None = model
        """The model, until the block ends."""
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
        self._routing: RoutingProbe | None = RoutingProbe(model, routing)
        self._routing_mode = routing
        self._spans = SpanProbe(model) if spans else None
        self._detach = ExitStack()
        self._used = False
        self._lock = threading.RLock()
        self._numbers = itertools.count()
        self._layer_hooks: dict[int, RemovableHandle] = {}
        """Count how often the attention of a layer runs."""
        self._asked: set[int] = set()
        """Layers that have asked transformers' interface for their attention."""
        self._steps: dict[int, Step] = {}
        """The forward call in progress, by thread."""
        self._latest: dict[int, Step] = {}
        """The last finished call, by thread: where it was the decoder's alone, the output head may follow."""
        self._pending: list[Step] = []
        self._importance = ImportanceLog(self._writer)
        self._regimes: set[str] = set()
        """The kinds of call seen, whose eager bytes the trace has to know."""
        self._traffic: dict[str, Any] = {}
        self._unfinished: list[dict[str, Any]] = []
        self._notes: dict[str, None] = {}
        self._own_ns = self._outside = 0

    def __enter__(self) -> Profile:
        if self._used:
            raise UserError("This profile has been used; make a new one with wb.profile(model) for another run.")
        self._used = True
        with ExitStack() as stack:
            stack.callback(self._devices.stop)
            self._devices.start()
            self._attach(self.model, stack)
            self._detach = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._detach.close()
        for step in self._steps.values():
            self._leave_unfinished(step)
        self._conclude()
        overhead = {"own_ns": self._own_ns, "how": "time spent inside the probes' own hooks, summed"}
        ending = {"complete": error is None, **({"error": repr(error)} if error else {})}
        try:
            self._resolve()
            self._importance.flush()
            self._writer.close(own_overhead=overhead, **self._findings(), **ending)
        except UserError as failure:
            if error is None:
                raise
            error.add_note(str(failure))
        finally:
            self.model = self._routing = self._spans = None
            self._steps.clear()
            self._latest.clear()

    @property
    def trace(self) -> Trace:
        """What was recorded so far."""
        with self._lock:
            self._resolve()
            self._importance.flush()
            return Trace({**self._writer.meta, **self._findings()}, self._writer.tables())

    def _attach(self, model: nn.Module, stack: ExitStack) -> None:
        counts = NestedCounts()
        probes = (
            AttentionProbe(model, self),
            self._routing,
            UnplacedProbe(model, counts, self._on_unplaced),
            LayerCheck(model, self.anatomy, counts, self._current, self._note, self._trust),
            *([self._spans] if self._spans else []),
        )
        self._counts = counts
        stack.callback(counts.clear)
        for probe in probes:
            stack.callback(probe.detach)
            probe.attach()
        stack.callback(model.get_output_embeddings().register_forward_pre_hook(self._before_head).remove)
        for layer, module in enumerate(attention_modules(model)):
            self._layer_hooks[layer] = module.register_forward_pre_hook(self._layer_observer(layer))
            stack.callback(self._uncount, layer)
        for module in dict.fromkeys((model, decoder(model))):
            names = tuple(inspect.signature(module.forward).parameters)
            before = functools.partial(self._before_step, names)
            stack.callback(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True).remove)
            stack.callback(module.register_forward_hook(self._after_step, with_kwargs=True, always_call=True).remove)

    def _current(self) -> Step | None:
        """The forward call in progress on this thread."""
        return self._steps.get(threading.get_ident())

    def _note(self, sentence: str) -> None:
        """Says in the trace what was not measured, or not checked."""
        self._notes[sentence] = None

    def _findings(self) -> dict[str, Any]:
        """What the trace says of itself."""
        if self.model is not None:
            self._traffic = eager_traffic(self.model, self._regimes)
        return {
            "unfinished_steps": list(self._unfinished),
            "notes": list(self._notes),
            "importance_pooling": self._importance.meta(),
            "eager_traffic": self._traffic,
        }

    def _before_step(self, names: tuple[str, ...], module: nn.Module, args: tuple, kwargs: dict) -> None:
        if torch.compiler.is_compiling():
            refuse_compiled()
        if is_unobserved():
            return
        own = time.perf_counter_ns()
        thread = threading.get_ident()
        step = self._steps.get(thread)
        if step is not None:
            if step.module is self.model and module is not self.model and not step.in_decoder:
                step.in_decoder = True
                return
            self._leave_unfinished(self._steps.pop(thread))
        self._counts.clear()
        self._routing.take()
        if self._spans:
            self._spans.take()
        if len(self._pending) >= _STEPS_HELD:
            self._resolve()
        given = dict(zip(names, args, strict=False)) | kwargs
        step = self._begin(module, given)
        if step is None:
            return
        self._steps[thread] = step
        step.begun = mark(step.device)
        step.start_ns = time.perf_counter_ns()
        self._own_ns += step.start_ns - own

    def _begin(self, module: nn.Module, given: dict[str, Any]) -> Step | None:
        ids = given.get("input_ids")
        entering = ids if ids is not None else given.get("inputs_embeds")
        if entering is None:
            return None
        if given.get("cache") is not None:
            self._note(_PAGED)  # generate_batch() keeps an error of its worker thread to itself
            raise UserError(_PAGED)
        cache = given.get("past_key_values")
        cache = cache if isinstance(cache, Cache) else None
        mask = given.get("attention_mask")
        mask = mask if isinstance(mask, torch.Tensor) and mask.ndim == 2 else None
        return Step(
            number=next(self._numbers),
            module=module,
            batch=entering.shape[0],
            q_len=entering.shape[1],
            past=int(cache.get_seq_length()) if cache is not None else 0,
            given_cache=cache,
            device=entering.device,
            ids=None if ids is None else ids.clone(),  # the caller may write the next tokens into the same tensor
            mask=mask,
            padding=None if mask is None else (mask == 0).sum(1),
        )

    def _before_head(self, head: nn.Module, args: tuple) -> None:
        if is_unobserved():
            return
        step = self._current() or self._latest.get(threading.get_ident())
        if step is None or step.written:
            self._note("The output head was called outside any forward call; that is not in this trace.")
        else:
            step.logits += args[0].shape[:-1].numel()

    def _layer_observer(self, layer: int) -> Callable[[nn.Module, tuple], None]:
        def observe(module: nn.Module, args: tuple) -> None:
            step = self._current()
            if step is not None:
                step.ran[layer] += 1

        return observe

    def _trust(self, layer: int) -> None:
        """The runs of a layer are not counted any more if its attention goes through transformers' interface."""
        if layer in self._asked:
            self._uncount(layer)

    def _uncount(self, layer: int) -> None:
        hook = self._layer_hooks.pop(layer, None)
        if hook is not None:
            hook.remove()

    def _on_unplaced(self, name: str, flops: int) -> None:
        step = self._current()
        if step is not None:
            step.unattributed.append((name, flops))

    def before_attention(self, module: nn.Module) -> None:
        """What the attention function computes is measured by its shapes; a layer that is checked leaves it out."""
        if self._counts.active:
            self._counts.enter(module)

    def after_attention(self, layer: int, module: nn.Module, query, key, mask, options: dict[str, Any], kernel: str) -> None:
        """Records a layer's attention call: queries `[B, Hq, Q, D]`, keys `[B, H, N, D]`."""
        own = time.perf_counter_ns()
        inside = self._counts.leave(module)
        step = self._current()
        if step is None:
            self._outside += not is_unobserved()
            return
        if self._layer_hooks:
            self._asked.add(layer)
        batch, _, q_len, _ = query.shape
        kv_read = key.shape[2]
        window = options.get("sliding_window")
        mask = mask if isinstance(mask, torch.Tensor) else None
        alike = (id(mask), kv_read, window)
        counted = step.pairs.get(alike)
        if counted is None:
            counted = step.pairs[alike] = visible_pairs(q_len, kv_read, batch, mask, window)
            step.masks.append(mask)
        kind = "causal" if mask is None else "padded or sliding"
        call = (layer, step.ran[layer] if step.ran else 0)
        if call in step.attention:  # an attention that asks for the function twice, as a differential one does
            _, _, read_before, counted_before, *_ = step.attention[call]
            kv_read, counted = kv_read + read_before, counted + counted_before
        if inside:
            step.counted_attention[call] += inside
        step.attention[call] = (batch, q_len, kv_read, counted, kernel, kind)
        if observes(self.importance, q_len):
            with unobserved():  # our own products are no part of a layer that is being checked
                step.importance.append((layer, *self._mass(step, layer, query, key, mask, options)))
        self._own_ns += time.perf_counter_ns() - own

    def _mass(self, step: Step, layer: int, query, key, mask, options: dict) -> tuple[torch.Tensor, int]:
        written = step.context
        if key.shape[2] > written:
            key, mask = key[:, :, :written], None if mask is None else mask[..., :written]
        occupied = None if mask is None else step.visible(mask)
        asking = None
        if step.mask is not None:
            asking = step.mask[:, -step.q_len :].bool().to(query.device)
        return attention_mass(
            self.importance,
            query,
            key,
            options.get("scaling") or query.shape[-1] ** -0.5,
            asking=asking,
            occupied=None if occupied is None else occupied.expand(key.shape[:3]),
            window=self.anatomy.layers[layer].attention.window,
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
        )

    def _after_step(self, module: nn.Module, args: tuple, kwargs: dict, output: Any) -> None:
        own = time.perf_counter_ns()
        thread = threading.get_ident()
        step = self._steps.get(thread)
        if step is None:
            return
        if step.module is not module:
            step.in_decoder = False
            return
        del self._steps[thread]
        self._counts.clear()  # another thread may have ended the check of a layer that was running in this one
        if output is None:  # the call raised
            self._leave_unfinished(step)
            return
        step.duration_ns = own - step.start_ns
        step.ended = mark(step.device)
        if self._spans:
            step.spans = self._spans.take()
        returned = output if isinstance(output, tuple) else (getattr(output, "past_key_values", None),)
        cache = next((part for part in (*returned, step.given_cache) if isinstance(part, Cache)), None)
        step.cache = [] if cache is None else self._cache_facts(step, cache)
        step.attention |= dict(_unseen_attention(step))
        step.given_cache = step.mask = None
        step.routing = self._routing.take()
        self._latest[thread] = step
        with self._lock:
            self._pending.append(step)
        self._own_ns += time.perf_counter_ns() - own

    def _leave_unfinished(self, step: Step) -> None:
        """A call that never came to its end is left out of the tables, and the trace says so."""
        facts = {"step": step.number, "phase": step.phase, "batch": step.batch, "tokens": step.batch * step.q_len}
        self._unfinished.append(facts)

    def _conclude(self) -> None:
        """Notes what was seen that is in no table."""
        if self._outside:
            self._note(
                f"{self._outside} attention calls ran outside any forward call (a layer called by hand, or a backward pass "
                "that computes them again); they are not in this trace."
            )
        for sentence in self._routing.notes():
            self._note(sentence)
        if next(self._numbers) == 0 and not self._notes:
            self._note("No forward call was seen: the model was not called in the block, or a compiled copy of it was.")

    def _cache_facts(self, step: Step, cache: Cache) -> list[tuple[int, int, int]]:
        """Layer, held tokens (over rows and kv heads) and bytes really allocated, for every layer of a cache."""
        facts = []
        for index, layer in enumerate(cache.layers[: self.anatomy.num_layers]):
            if hasattr(layer, "physical_bytes"):
                facts.append((index, layer.held_tokens, layer.physical_bytes))
                continue
            keys, allocated = getattr(layer, "keys", None), _allocated_bytes(layer)
            if allocated is None:
                self._note(f"What a {type(layer).__name__} holds cannot be read; its cache rows are missing.")
            elif hasattr(layer, "_quantize"):  # its `keys` are only those not quantised yet
                heads = self.anatomy.layers[index].attention.num_kv_heads
                facts.append((index, step.batch * heads * step.context, allocated))
            elif keys is not None:
                slots = min(keys.shape[-2], step.context)  # a buffer of fixed size is not full
                facts.append((index, keys.shape[:-2].numel() * slots, allocated))
            elif allocated:  # the states of a recurrent layer
                facts.append((index, 0, allocated))
        return facts

    def _resolve(self) -> None:
        """Turns what waits into rows; the only place where device tensors are fetched."""
        with self._lock:
            pending, self._pending = self._pending, []
            for step in pending:
                self._write(step)
            self._writer.extend("routing", routing_rows([(step.number, step.routing) for step in pending]))
            if self._routing_mode != "load":
                for step in pending:
                    self._writer.extend("choices", choice_rows(step.number, step.routing, _starts(step)))
            self._writer.extend("device", self._devices.rows())
            self._writer.flush(everything=self._writer.directory is not None)

    def _write(self, step: Step) -> None:
        add = self._writer.add
        tokens = step.batch * step.q_len
        self._regimes.add(regime(step.phase, step.batch, step.batch * step.q_len, step.padding is not None))
        timing = (step.start_ns, step.duration_ns, elapsed_ns(step.begun, step.ended))
        counts = (step.batch, tokens, step.context, step.logits, step.padding is not None)
        add("steps", step.number, step.phase, *counts, *timing, "dense")
        self._writer.extend("spans", span_rows(step.number, step.spans))
        step.written = True
        for (layer, _), (batch, q_len, kv_read, pairs, kernel, kind) in step.attention.items():
            held = min(kv_read, step.context) if step.cache else 0
            add("attention", step.number, layer, batch, q_len, kv_read, held, int(pairs), kernel, kind)
        for layer, held, physical_bytes in step.cache:
            attention = self.anatomy.layers[layer].attention
            a_token = attention.cached_elements * self.anatomy.element_bytes
            nominal = step.batch * step.context * a_token
            add("cache", step.number, layer, "append", tokens, held, physical_bytes, nominal, 0, 0)
        self._writer.extend("unattributed", ((step.number, *call) for call in step.unattributed))
        for layer, mass, window in step.importance:
            start = step.context - mass.shape[-1]
            self._importance.add(step.number, layer, start, mass, window, step.phase == "decode")
        self._write_tokens(step)

    def _write_tokens(self, step: Step) -> None:
        if step.ids is None:
            return
        for row, (start, ids) in enumerate(zip(_starts(step), step.ids.tolist(), strict=True)):
            for position, token in enumerate(ids, start):
                if position >= 0:
                    text = self.tokenizer.decode([token]) if self.tokenizer is not None else None
                    self._writer.add("tokens", step.number, row, position, token, text, None, None, step.phase)


def _starts(step: Step) -> list[int]:
    """The position of the first token of each row, below 0 where the row begins with padding."""
    padding = [0] * step.batch if step.padding is None else step.padding.tolist()
    return [step.past - missing for missing in padding]


def profile(
    model: nn.Module,
    importance: str = "off",
    *,
    routing: str = "load",
    spans: bool = False,
    tokenizer: PreTrainedTokenizerBase | None = None,
    out: str | Path | None = None,
    device_period_s: float | None = None,
) -> Profile:
    """Records a trace of everything a model does inside the `with` block, whichever thread calls it.

    `trace.notes` says what was not measured. The model is as it was afterwards, whatever was raised inside.

    Args:
        model: any `transformers` causal LM; it may be called by `forward`, `generate` or a loop of your own.
        importance: `off`; `decode` (attention mass of each decoded token); `window` (of the last 32 queries of a prompt
            too); `full` (of all queries).
        routing: `load` (tokens each expert is given); `choices` (also where each token went, table `choices`); `logits` (also
            the router's logits over all experts).
        spans: times every layer and its parts too (table `spans`), which costs two hooks a module.
        tokenizer: writes tokens as text into the trace.
        out: directory to stream the trace to; a killed process leaves a readable trace there.
        device_period_s: seconds between samples of the GPUs. None is 0.1 for a model on CUDA and no sampling elsewhere; a
            model off CUDA with a period has every GPU sampled that NVML lists; `math.inf` switches it off.

    Raises:
        UserError: if the model is no decoder-only causal LM, is compiled, only wraps one, or its attention cannot be
            observed, and for a period that is none.
    """
    return Profile(
        model, importance, routing=routing, spans=spans, tokenizer=tokenizer, out=out, device_period_s=device_period_s
    )


def _unseen_attention(step: Step) -> Iterator[tuple[tuple[int, int], tuple]]:
    """Attention of layers that ran without transformers' interface, by layer and call."""
    for layer, runs in step.ran.items():
        for run in range(1, runs + 1):
            if layer in step.unknown_attention:
                yield (layer, run), (step.batch, step.q_len, 0, 0, "of the model's own", "unknown")
            elif (layer, run) not in step.attention:
                pairs = visible_pairs(step.q_len, step.context, step.batch, None)
                yield (
                    (layer, run),
                    (step.batch, step.q_len, step.slots_read(layer), pairs, "of the model's own", "assumed causal"),
                )


def _allocated_bytes(layer: Any) -> int | None:
    """Bytes of what a cache layer holds: keys and values, or states. None where a tensor hides how it is stored."""
    stores = {}
    for value in vars(layer).values():
        if type(value) in _SCALARS:
            continue
        for part in value if isinstance(value, _SEQUENCES) else (value,):
            if type(part) is torch.Tensor and part.ndim > 1:
                storage = part.untyped_storage()
                stores[storage.data_ptr()] = storage.nbytes()
            elif isinstance(part, torch.Tensor) and part.ndim > 1:
                return None
    return sum(stores.values())


_SCALARS = {int, bool, float, str, type(None), torch.dtype, torch.device}
_SEQUENCES = (list, tuple)
