"""One running generation under a setup: prefill, step, generate, append, swap, branch.

The session attaches to the model for the length of each call and leaves it as it found it, so sessions with different
methods, and plain `generate()`, may take turns on one model.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from workbench.engine.attention import engine_attention
from workbench.engine.cache import allocate, engine_cache, swap_policy
from workbench.engine.call import Call, Work
from workbench.engine.check import check_engine
from workbench.engine.decoding import Generated, check_decoding
from workbench.engine.rehearsal import plan, rehearse
from workbench.engine.replacing import Replacement, replacement, rerouted, work_rows
from workbench.engine.setup import Method, Setup
from workbench.engine.thinning import check_thinning, thinners
from workbench.engine.together import decide_together
from workbench.errors import UserError
from workbench.models.anatomy import accepts_logits_to_keep
from workbench.probes.attention import attention_configs
from workbench.probes.device import device_sampler
from workbench.probes.environment import environment
from workbench.probes.importance import ImportanceLog, check_mode
from workbench.probes.moe import Choice, RoutingProbe, choice_rows, routing_rows
from workbench.probes.spans import SpanProbe, span_rows
from workbench.probes.traffic import eager_traffic
from workbench.trace.schema import CATCH_UP, DRAFT
from workbench.trace.store import TraceWriter
from workbench.trace.trace import Trace
from workbench.trace.traffic import regime

if TYPE_CHECKING:
    from workbench.models.load import LM

_STEPS_HELD = 64
"""Steps whose expert choices may wait on the device before they are fetched in one go."""

Prompt = str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]] | torch.Tensor


class Session:
    """A generation whose cache is ruled by a setup."""

    def __init__(
        self,
        lm: LM,
        setup: Setup | Method | Iterable[Method] | None = None,
        *,
        importance: str = "off",
        routing: str = "load",
        spans: bool = False,
        out: str | Path | None = None,
        device_period_s: float | None = None,
    ):
        """Nothing runs before `prefill`.

        Args:
            lm: the model.
            setup: a setup, a method or several; None is dense.
            importance: `off`, `decode`, `window` or `full`, as in `wb.profile`.
            routing: `load`, `choices` or `logits`, as in `wb.profile`.
            spans: times every layer and its parts too, as in `wb.profile`.
            out: directory to stream the trace to; a killed process leaves a readable trace there.
            device_period_s: seconds between samples of the GPUs while the model runs, as in `wb.profile`.
        """
        self.lm = lm
        self.setup = Setup.of(setup).ready(lm)
        check_engine(lm.model, lm.anatomy)
        self._devices = device_sampler(lm.model, device_period_s)
        meta = {
            "anatomy": lm.anatomy.to_dict(),
            "setup": self.setup.label,
            "swaps": [],
            "environment": environment(),
            "clock": "perf_counter_ns",
            "importance": check_mode(importance),
            "device_period_s": self._devices.period_s,
        }
        self._call = Call(TraceWriter(meta, Path(out) if out is not None else None), step=-1, importance=importance)
        check_thinning(lm.model, lm.anatomy, self.setup.cache)
        self._cache = engine_cache(lm.model, lm.anatomy, self.setup.cache, self._call)
        self._replacement = self._replacing(self.setup)
        self._routing = self._routing_probe(routing)
        self._spans = SpanProbe(lm.model) if spans else None
        self._choices: list[tuple[int, list[Choice]]] = []
        self._works: list[tuple[int, list[Work]]] = []
        self._configs = attention_configs(lm.model)
        self._device, self._pad = lm.device, lm.pad_token
        self._tokens: list[list[int]] = []
        self._prompt_tokens: list[int] = []
        self._logits: torch.Tensor | None = None
        self._interrupted = False
        self._attempted = 0
        self._unread: list[int] = []
        self.partner: Session | None = None
        """Another model's session that a decoding method runs beside this one; a branch goes on with a branch of it."""
        self._regimes: set[str] = set()
        self._importance = ImportanceLog(self._call.writer)
        self._keeps_logits = accepts_logits_to_keep(lm.model)

    @property
    def tokens(self) -> list[list[int]]:
        """The tokens of each row so far, padding left out."""
        return [[*row, *self._unread] for row in self._tokens]

    @property
    def steps(self) -> int:
        """Forward calls of the model so far, rehearsals and those before a branch included."""
        return self._call.step + 1

    @property
    def logits(self) -> torch.Tensor:
        """`[B, V]` scores of the next token. Raises UserError before the prefill."""
        if self._logits is None:
            raise UserError("This session has no prompt yet; call prefill(text) first.")
        return self._logits

    @property
    def trace(self) -> Trace:
        """What was recorded so far."""
        self._devices.sample()
        self._resolve()
        writer = self._call.writer
        self._importance.flush()
        return Trace({**writer.meta, **self._derived(), "complete": not self._interrupted}, writer.tables())

    @property
    def physical_bytes(self) -> int:
        """Bytes the cache really occupies."""
        return sum(layer.physical_bytes for layer in self._cache.layers)

    def prefill(self, prompt: Prompt) -> torch.Tensor:
        """Reads a prompt, or a batch of them, and lets the method act at its end. Returns the next token's logits `[B, V]`.

        Raises UserError if the session has a prompt already, the prompt is empty, or longer than the model's context.
        """
        if self._tokens:
            raise UserError("This session has its prompt already; use append(text) for a further turn, or a new Session.")
        rows = self._encode(prompt, special_tokens=True)
        self._check_room(rows)
        self._prompt_tokens = [len(row) for row in rows]
        self._set_capacity()
        return self._forward(rows, "prefill")

    def append(self, text: Prompt) -> torch.Tensor:
        """Adds a further turn to every row. Returns the next token's logits `[B, V]`."""
        _ = self.logits
        rows = self._encode(text, special_tokens=False)
        if len(rows) != len(self._tokens):
            raise UserError(f"The session has {len(self._tokens)} rows, and {len(rows)} were appended; give one for each.")
        if len({len(row) for row in rows}) > 1:
            raise UserError("The appended turns differ in length; append rows of a batch with as many tokens each.")
        self._check_room(rows)
        return self._forward(rows, "append" if len(rows[0]) > 1 else "decode")

    def step(self, token_ids: Sequence[int] | None = None) -> torch.Tensor:
        """Decodes one token a row: the likeliest, or those given. Returns the next token's logits `[B, V]`."""
        if token_ids is None:
            token_ids = self.logits.argmax(-1).tolist()
        if self._logits is None or len(token_ids) != len(self._tokens):
            raise UserError(f"A step takes one token for each of the {len(self._tokens)} rows; call prefill(text) first.")
        rows = [[int(token)] for token in token_ids]
        self._check_room(rows)
        return self._forward(rows, "decode")

    def generate(
        self,
        max_new_tokens: int,
        on_token: Callable[[list[int]], None] | None = None,
        *,
        stop_at_end: bool = True,
    ) -> Generated:
        """Decodes greedily, or as the setup's decoding method does, until every row has ended or `max_new_tokens` are there.

        Args:
            max_new_tokens: most tokens to add to each row.
            on_token: called with the new token id of each row, as soon as it is known.
            stop_at_end: whether a row ends at the model's end-of-sequence token.
        """
        if max_new_tokens < 1:
            raise UserError(f"Cannot generate {max_new_tokens} tokens; ask for 1 or more.")
        if self.setup.decoding is not None:
            _ = self.logits
            return self.setup.decoding.decode(self, max_new_tokens, on_token, stop_at_end)
        ends = self.lm.end_tokens if stop_at_end else ()
        new: list[list[int]] = [[] for _ in self._tokens]
        open_rows = [True] * len(self._tokens)
        next_tokens = self.logits.argmax(-1).tolist()
        for _count in range(1, max_new_tokens + 1):
            for row, token in enumerate(next_tokens):
                if open_rows[row]:
                    new[row].append(token)
                    open_rows[row] = token not in ends
            if on_token is not None:
                on_token(list(next_tokens))
            self.step(next_tokens)
            if not any(open_rows):
                break
            next_tokens = self.logits.argmax(-1).tolist()
        return Generated.of(self.lm, new)

    @torch.no_grad()
    def attempt(self, tokens: Sequence[int], phase: str) -> torch.Tensor:
        """Runs tokens that are no part of the only text yet. Returns the logits after each, `[n, V]`.

        They stay in the cache for tokens to follow, until `take_back` or `settle`.
        """
        past = len(self._tokens[0]) + self._attempted
        self._check_room([list(range(self._attempted)) + list(tokens)])
        positions = torch.arange(past, past + len(tokens), dtype=torch.int32, device=self._device)[None]
        ids = torch.tensor([list(tokens)], device=self._device)
        self._begin()
        logits = self._run_for(len(tokens), phase, positions, [past + len(tokens)], positions, input_ids=ids)
        self._attempted += len(tokens)
        self._interrupted = False
        return logits[0]

    def take_back(self, count: int) -> None:
        """Takes the last `count` attempted tokens out of the cache."""
        if not count:
            return
        self._attempted -= count
        self._call.seen = [len(self._tokens[0]) + self._attempted]
        for layer in self._cache.layers:
            layer.take_back(count)

    def settle(self, tokens: Sequence[int], logits: torch.Tensor) -> None:
        """Makes attempted tokens part of the text: those in the cache, of which `tokens` are the first; others are taken back.

        `logits` `[n, V]` are those after each of these, the last of them the next token's.
        """
        self.take_back(self._attempted - len(tokens))
        self._attempted = 0
        before = torch.cat([self.logits, logits[:-1]])
        self._write_tokens(0, len(self._tokens[0]), tokens, _likelihoods(before, tokens))
        self._tokens[0] += tokens
        self._logits = logits[-1:]
        for layer in self._cache.layers:
            layer.forget()
        self._settle(self._call.phase)

    def defer(self, token: int, logits: torch.Tensor) -> None:
        """Adds a token to the only text that the model reads with the next call, or by `catch_up`.

        `logits` `[1, V]` are those it was taken from.
        """
        self._check_room([[token]])
        self._write_tokens(0, len(self.tokens[0]), [token], _likelihoods(logits, [token]))
        self._unread.append(token)

    @property
    def num_unread(self) -> int:
        """Tokens of the text that the model has not read."""
        return len(self._unread)

    def expect(self, logits: torch.Tensor) -> None:
        """Takes another model's word for what comes next: its logits `[1, V]`."""
        self._logits = logits

    def catch_up(self) -> torch.Tensor:
        """Reads what of the text was deferred. Returns the next token's logits `[1, V]`."""
        return self._forward([[]], "decode") if self._unread else self.logits

    def record_partner(self, started_ns: int, duration_ns: int, tokens: int) -> int:
        """Writes a step in which the partner read tokens. Returns its number, for rows of work."""
        call = self._call
        call.step += 1
        call.phase = DRAFT if tokens == 1 else CATCH_UP
        row = (call.step, call.phase, 1, tokens, len(self.tokens[0]), 0, False, started_ns, duration_ns, None, self.setup.label)
        call.writer.add("steps", *row)
        self._regimes.add(regime(call.phase, 1, tokens, False))
        return call.step

    @property
    def call(self) -> Call:
        """The call in progress, where a method writes what it did."""
        return self._call

    def swap(self, setup: Setup | Method | Iterable[Method] | None) -> None:
        """Puts another setup in charge from the next call on; None is dense. The setup in force already changes nothing.

        What was evicted stays evicted; what is held is decided anew. The new method decides in the next call, once its
        token has been attended over all that is held: only then are there queries to score with. A method that acts on
        prompts alone decides that once, too, and scores with the queries of that call, which are few in a decode step.
        Accumulated attention (H2O) starts at zero for the tokens held, unless the old method kept it as well; other side
        state starts anew. A method that decides every so many tokens waits for its turn. Under dense nothing more is evicted.

        A budget given as a fraction is, as everywhere, a fraction of the prompt. The `setup` column of `steps` says which
        setup ruled a step, and `swaps` in the trace's meta lists each change with the first step it rules.
        """
        new = Setup.of(setup)
        if new.label == self.setup.label:
            return
        new = new.ready(self.lm)
        writer = self._call.writer
        change = {"step": self._call.step + 1, "from": self.setup.label, "to": new.label}
        check_thinning(self.lm.model, self.lm.anatomy, new.cache)
        replaced = self._replacing(new)
        swap_policy(self.lm.model, self._cache, new.cache)
        self.setup, self._replacement, self.partner = new, replaced, None
        self._set_capacity()
        writer.update_meta(swaps=[*writer.meta["swaps"], change])

    def branch(self) -> Session:
        """An independent copy that goes on from here. It shares nothing mutable; it costs a copy of the cache.

        Its trace starts empty, and its meta says at which step it branched off, and under which setup.
        """
        other = copy.copy(self)
        branched = {"setup": self.setup.label, "swaps": [], "branched_at_step": self._call.step}
        meta = {name: value for name, value in self._call.writer.meta.items() if name != "decoding"} | branched
        other._call = copy.copy(self._call)
        other._call.writer = TraceWriter(meta)
        other._call.seen = list(self._call.seen)
        other._call.choices, other._call.works, other._call.memory = {}, [], dict(self._call.memory)
        other._replacement = other._replacing(self.setup)
        other._unread = list(self._unread)
        other.partner = self.partner.branch() if self.partner is not None else None
        other._cache = type(self._cache)(layers=[layer.clone(other._call) for layer in self._cache.layers])
        other._routing, other._choices, other._works = other._routing_probe(self._routing.mode), [], []
        other._spans = SpanProbe(self.lm.model) if self._spans else None
        other._regimes = set()
        other._importance = ImportanceLog(other._call.writer)
        other._devices = self._devices.another()
        other._tokens = [list(row) for row in self._tokens]
        return other

    def close(self) -> None:
        """Ends the sampling of devices and the trace on disk, if the session writes one."""
        self._devices.stop()
        self._resolve()
        self._importance.flush()
        self._call.writer.close(complete=not self._interrupted, **self._derived())

    def _derived(self) -> dict[str, Any]:
        """What a trace's meta says once the run is over."""
        traffic = eager_traffic(self.lm.model, self._regimes)
        notes = self._routing.notes()
        return {"eager_traffic": traffic, "importance_pooling": self._importance.meta(), **({"notes": notes} if notes else {})}

    @torch.no_grad()
    def _forward(self, rows: list[list[int]], phase: str) -> torch.Tensor:
        """One forward call of the model over `rows`, padded on the left to one length."""
        self._check_whole()
        new, unread = rows, self._unread
        if unread:
            rows, self._unread = [[*unread, *rows[0]]], []
            phase = CATCH_UP if phase == "decode" and len(rows[0]) > 1 else phase
        known = self._tokens or [[] for _ in rows]
        rehearsal = plan(self.lm, self.setup.cache, self._cache.layers, self._call, phase, known, rows)
        self._interrupted = True
        self._tokens = known
        device = self._device
        length = max(map(len, rows))
        padding = [length - len(row) for row in rows]
        past = [len(row) for row in self._tokens]
        starts = [seen - missing for seen, missing in zip(past, padding, strict=True)]
        ids = torch.tensor([[self._pad] * missing + row for missing, row in zip(padding, rows, strict=True)], device=device)
        positions = torch.tensor([list(range(start, start + length)) for start in starts], dtype=torch.int32, device=device)
        rotated = positions.clamp(min=0) if any(padding) else positions
        seen = [before + len(row) for before, row in zip(past, rows, strict=True)]
        logits = self._run(phase, positions.clamp(min=-1), seen, rotated, has_padding=any(padding), input_ids=ids)
        self._record_tokens(new)
        for before, row in zip(known, rows, strict=True):
            before += row
        self._logits = logits
        if rehearsal is not None:
            rehearse(rehearsal, self._cache.layers, self._call, logits, self._run)
        self._settle(phase)
        self._interrupted = False
        return logits

    def _run(
        self,
        phase: str,
        positions: torch.Tensor,
        seen: list[int],
        position_ids: torch.Tensor,
        has_padding: bool = False,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """One forward call of the model and its rows in the trace; see `rehearsal.Forward`."""
        return self._run_for(1, phase, positions, seen, position_ids, has_padding, **inputs)[:, -1]

    def _run_for(
        self,
        num_logits: int,
        phase: str,
        positions: torch.Tensor,
        seen: list[int],
        position_ids: torch.Tensor,
        has_padding: bool = False,
        **inputs: torch.Tensor,
    ) -> torch.Tensor:
        """The same, with the logits after the last `num_logits` tokens, `[B, n, V]`."""
        call, device = self._call, self._device
        call.step += 1
        call.phase, call.positions, call.seen, call.has_padding = phase, positions, seen, has_padding
        call.thinned, call.kept, call.read, call.choices, call.works = None, {}, {}, {}, []
        try:
            with self._attached():
                if self._spans:
                    self._spans.take()
                started = time.perf_counter_ns()
                out = self.lm.model(
                    **inputs,
                    position_ids=position_ids,
                    past_key_values=self._cache,
                    use_cache=True,
                    **({"logits_to_keep": num_logits} if self._keeps_logits else {}),
                )
                logits = out.logits[:, -num_logits:].float()
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                duration = time.perf_counter_ns() - started
        except BaseException:
            call.writer.leave_out(call.step, phase, len(positions), positions.numel())
            raise
        self._record(positions.shape, out.logits.shape[1], started, duration)
        return logits

    def _replacing(self, setup: Setup) -> Replacement:
        """Forwards that a setup replaces. Raises UserError for methods that do not go with the model or with each other."""
        if setup.routing is not None:
            setup.routing.check(self.lm.anatomy)
        check_decoding(self.lm, setup.decoding, setup.cache, setup.routing)
        return replacement(self.lm, setup.replacing, self._call)

    def _check_whole(self) -> None:
        if self._interrupted:
            raise UserError("An earlier call of this session did not finish, so its cache is incomplete; start a new Session.")

    def _begin(self) -> None:
        """Until it is said otherwise, what follows is not finished."""
        self._check_whole()
        self._interrupted = True

    def _routing_probe(self, mode: str) -> RoutingProbe:
        return RoutingProbe(self.lm.model, mode, positions=self._call.positions_of)

    def _set_capacity(self) -> None:
        """Resolves the budget of the method in charge for the prompt of each row."""
        self._call.capacity = allocate(self.lm.anatomy, self.setup.cache, self._prompt_tokens)
        self._call.prompt_tokens = self._call.divided_at = self._prompt_tokens

    @contextmanager
    def _attached(self):
        self._devices.start()
        with engine_attention(self._configs):
            probes = [
                self._replacement,
                self._routing,
                *([self._spans] if self._spans else []),
                *thinners(self.lm.model, self.setup.cache, self._call),
            ]
            # first of the model's hooks, so that whoever observes the call sees the cache as it leaves it
            deciding = self.lm.model.register_forward_hook(lambda *_: decide_together(self._call), prepend=True)
            try:
                for probe in probes:
                    probe.attach()
                yield
            finally:
                self._devices.pause()
                deciding.remove()
                for probe in probes:
                    probe.detach()

    def _record(self, shape: torch.Size, logits_length: int, started: int, duration: int) -> None:
        call = self._call
        add = call.writer.add
        batch, length = shape
        context = max(call.seen)
        tokens, logits = batch * length, batch * logits_length
        timing = (started, duration, None)
        add("steps", call.step, call.phase, batch, tokens, context, logits, False, *timing, self.setup.label)
        self._regimes.add(regime(call.phase, batch, tokens, False))
        self._choices.append((call.step, rerouted(self._routing.take(), call.choices)))
        self._works.append((call.step, call.works))
        for layer, mass, window in call.masses:
            self._importance.add(call.step, layer, 0, mass, window, call.phase == "decode")
        call.masses.clear()
        if self._spans:
            call.writer.extend("spans", span_rows(call.step, self._spans.take()))

    def _settle(self, phase: str) -> None:
        """Fetches and writes what has been collected, after a prompt and from time to time."""
        if len(self._choices) >= _STEPS_HELD or phase == "prefill":
            self._resolve()
            self._call.writer.flush(everything=self._call.writer.directory is not None)

    def _resolve(self) -> None:
        """Turns what waits on the device into rows, and fetches the samples of the devices."""
        choices, self._choices = self._choices, []
        works, self._works = self._works, []
        self._call.writer.extend("routing", routing_rows(choices))
        self._call.writer.extend("work", work_rows(works))
        if self._routing.mode != "load":
            for step, seen in choices:
                self._call.writer.extend("choices", choice_rows(step, seen, [0] * len(self._tokens)))
        self._call.writer.extend("device", self._devices.rows())

    def _record_tokens(self, rows: list[list[int]]) -> None:
        """Writes the new tokens. How likely the first of them was follows from the logits before this call."""
        firsts: Sequence[tuple[float | None, float | None]] = [(None, None)] * len(rows)
        if self._logits is not None and all(rows):
            firsts = _likelihoods(self._logits, [row[0] for row in rows])
        for number, (ids, seen) in enumerate(zip(rows, self._call.seen, strict=True)):
            likely = [firsts[number], *((None, None) for _ in ids[1:])]
            self._write_tokens(number, seen - len(ids), ids, likely[: len(ids)])

    def _write_tokens(
        self, row: int, first: int, ids: Sequence[int], likely: Sequence[tuple[float | None, float | None]]
    ) -> None:
        call, text = self._call, self.lm.token_text
        call.writer.extend(
            "tokens",
            (
                (call.step, row, position, token, text(token), *pair, call.phase)
                for position, (token, pair) in enumerate(zip(ids, likely, strict=True), first)
            ),
        )

    def _encode(self, prompt: Prompt, special_tokens: bool) -> list[list[int]]:
        """Token ids of each row. Raises UserError for an empty prompt."""
        given: Any = prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            given = [given]
        encode = self.lm.tokenizer
        rows = [
            encode(row, add_special_tokens=special_tokens, verbose=False).input_ids if isinstance(row, str) else list(row)
            for row in given
        ]
        if not rows or "" in given or not all(rows):
            raise UserError("The prompt is empty; give at least one token of text.")
        return rows

    def _check_room(self, rows: list[list[int]]) -> None:
        limit = self.lm.anatomy.max_positions
        if limit is None:
            return
        seen = [len(row) for row in self.tokens] or [0] * len(rows)
        longest = max(before + len(row) for before, row in zip(seen, rows, strict=True))
        if longest > limit:
            raise UserError(f"{longest} tokens do not fit: {self.lm.name} has a context of {limit}; shorten the prompt.")


def _likelihoods(logits: torch.Tensor, tokens: Sequence[int]) -> list[tuple[float, float]]:
    """Log-probability of each token and entropy of what it was taken from, by logits `[n, V]`."""
    scores = logits.log_softmax(-1)
    entropies = -(scores.exp() * scores).sum(-1)
    logprobs = scores.gather(1, torch.tensor([[token] for token in tokens], device=scores.device)).flatten()
    return list(zip(logprobs.tolist(), entropies.tolist(), strict=True))
