"""Entropy adaptive decoding: a small model writes where it is sure, a large one where it is not."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from workbench.cost.ffn import read_bytes, resident_bytes, weights_bytes
from workbench.engine.session import Session
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.decoding.base import DecodingMethod, account
from workbench.models.load import LM, load

if TYPE_CHECKING:
    from workbench.trace.anatomy import Anatomy

SMALL, LARGE = "small", "large"
_STATE = "entropy-adaptive"


@dataclass(frozen=True)
class _State:
    """Where a text stands: which model writes, how many tokens it has since it took over, and the latest entropies."""

    active: str = SMALL
    since: int = 0
    entropies: tuple[float, ...] = ()


@register
@dataclass(frozen=True)
class EntropyAdaptive(DecodingMethod):
    """Lets a small model decode, and the session's own while the entropy of what comes next is high, from token to token."""

    name: ClassVar[str] = "entropy-adaptive"
    paper: ClassVar[str] = "Simonds 2025, arXiv 2502.06833"
    deviations: ClassVar[tuple[str, ...]] = (
        "The model that takes over first reads what it has not: this catching up, which the paper's measure of cost leaves "
        "out, is in the trace's steps, FLOPs and bytes, and counted beside that measure.",
        "Both models read the prompt, the small one before its first token. It writes first.",
        "A switch holds from the token after the one whose entropy called for it.",
        "Beside the paper's measure of cost, which weighs all parameters, stands one of those that a token uses: of a mixture "
        "of experts those of the experts it is given.",
        "The default threshold is that of the built-in pair; the paper sweeps it for every pair.",
    )

    small: str = knob("tiny-dense", help="The small model: a name or folder for wb.load; its tokenizer must be the same.")
    tau: float = knob(3.0, unit="bits", help="Mean entropy from which on the session's own model writes.")
    window: int = knob(5, low=1, high=1024, unit="tokens", help="Over how many of the latest tokens the entropy is averaged.")
    least: int = knob(10, low=1, high=1024, unit="tokens", help="Tokens a model writes at least before the other takes over.")

    def check(self, lm: LM) -> None:
        """Raises UserError if the small model's tokens are others."""
        small = _loaded(self.small, str(lm.device))
        same = small.tokenizer.get_vocab() == lm.tokenizer.get_vocab()
        if not same or small.anatomy.vocab_size != lm.anatomy.vocab_size:
            raise UserError(
                f"{self.name!r} lets {self.small} and {lm.name} write one text, and their tokens differ; name a small model "
                "with the same tokenizer, as small=NAME."
            )

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of the small model's FFNs."""
        return resident_bytes(_loaded(self.small, str(lm.device)).anatomy)

    def find(
        self, session: Session, room: int, ends: frozenset[int], forced: Sequence[int] | None
    ) -> tuple[list[int], list[torch.Tensor]]:
        """One token, by the model whose turn it is."""
        state: _State = session.call.memory.get(_STATE, _State())
        logits = self._logits(session, state.active)
        token = int(logits.argmax()) if forced is None else forced[0]
        session.defer(token, logits)
        account(session, tokens=1, by_other=state.active == SMALL, switches=0)
        session.call.memory[_STATE] = self._next(session, state, entropy(logits[0]))
        return [token], [logits]

    def settled(self, session: Session) -> None:
        """Lets the model whose turn it is read the last token, and brings the account up to date."""
        state: _State = session.call.memory[_STATE]
        session.expect(self._logits(session, state.active))
        self._write_work(session)
        counts, partner = account(session), session.partner
        large = 1 - counts["by_other"] / counts["tokens"]
        small, own = _loaded(self.small, str(session.lm.device)).anatomy, session.lm.anatomy
        figures = {
            "large_share": large,
            "cost": cost(large, small.num_parameters, own.num_parameters),
            "cost_used": cost(large, used_parameters(small), used_parameters(own)),
            "caught_up": counts.get("caught_up_small", 0) + counts.get("caught_up_large", 0),
        }
        held = partner.physical_bytes if partner is not None else 0
        session.call.writer.update_meta(decoding={**counts, "figures": figures, "kv_bytes": held})

    def _next(self, session: Session, state: _State, found: float) -> _State:
        """Whose turn the token after this one is."""
        entropies = (*state.entropies, found)[-self.window :]
        mean, since = sum(entropies) / len(entropies), state.since + 1
        wanted = LARGE if state.active == SMALL and mean >= self.tau else state.active
        wanted = SMALL if state.active == LARGE and mean <= self.tau else wanted
        if wanted == state.active or since < self.least:
            return _State(state.active, since, entropies)
        account(session, switches=1)
        return _State(wanted, 0, entropies)

    def _logits(self, session: Session, active: str) -> torch.Tensor:
        """What a model expects next, `[1, V]`, once it has read all there is."""
        if active == SMALL:
            return self._small_logits(session)
        missing = session.num_unread
        if missing > 1:
            account(session, caught_up_large=missing)
        return session.catch_up()

    def _small_logits(self, session: Session) -> torch.Tensor:
        text, partner = session.tokens[0], session.partner
        if partner is None:
            partner = session.partner = Session(_loaded(self.small, str(session.lm.device)))
        known = partner.tokens[0] if partner.tokens else []
        missing = text[len(known) :]
        if not missing:
            return partner.logits
        started = time.perf_counter_ns()
        logits = partner.append(missing) if known else partner.prefill(missing)
        step = session.record_partner(started, time.perf_counter_ns() - started, len(missing))
        if len(missing) > 1:
            account(session, caught_up_small=len(missing))
        memory = session.call.memory
        memory["partner steps"] = (*memory.get("partner steps", ()), (step, partner.steps - 1))
        return logits

    def _write_work(self, session: Session) -> None:
        """Rows of work for the steps the small model took, from its own trace."""
        memory = session.call.memory
        steps, memory["partner steps"] = memory.get("partner steps", ()), ()
        if not steps:
            return
        trace = session.partner.trace.select(steps=range(steps[0][1], steps[-1][1] + 1))
        keys = ["step", "component"]
        moved, read = trace.bytes(by=keys), read_bytes(trace).groupby(keys, as_index=False)["read_bytes"].sum()
        rows = moved.merge(trace.flops(by=keys), how="outer").merge(read, how="left")
        names = dict((theirs, ours) for ours, theirs in steps)
        for row in rows.fillna({"flops": 0, "bytes": 0}).itertuples():
            weights = None if row.read_bytes != row.read_bytes else int(row.read_bytes)
            given = (names[row.step], -1, row.component, 0, int(row.flops), int(row.bytes), weights)
            session.call.writer.add("work", *given)


def entropy(logits: torch.Tensor) -> float:
    """Of what comes next by logits `[V]`, in bits, before any temperature."""
    scores = logits.float().log_softmax(-1)
    return float(-(scores.exp() * scores).sum() / math.log(2))


def cost(large_share: float, small: int, large: int) -> float:
    """The paper's measure: parameters of the model that writes a token, on average, over those of the large one."""
    return (large_share * large + (1 - large_share) * small) / large


def used_parameters(anatomy: Anatomy) -> int:
    """Parameters that one token uses."""
    experts = [layer.experts for layer in anatomy.layers if layer.experts is not None]
    return anatomy.num_parameters - sum((each.num_experts - each.top_k) * weights_bytes(each.linears, 1) for each in experts)


@functools.lru_cache(maxsize=2)
def _loaded(name: str, device: str) -> LM:
    return load(name, device=device)
