"""A generation, token by token, that keeps what there is to see of it in a form that can be drawn at any moment."""

from __future__ import annotations

import copy

import numpy as np
import pandas as pd

from workbench.cost.metrics import cache_bytes, mass_by_position
from workbench.engine.session import Prompt, Session
from workbench.engine.setup import Method, Setup
from workbench.errors import UserError
from workbench.experiments.fidelity import kl_to_dense, top1_agreement
from workbench.models.load import LM
from workbench.trace.snapshot import HISTORY, Snapshot
from workbench.trace.trace import Trace


class LiveRun:
    """A session that is read, led on and changed one token at a time, and a dense run along the same tokens if wished.

    Not for several threads at once: `Player` plays runs in a thread of its own.
    """

    def __init__(
        self,
        lm: LM,
        setup: Setup | Method | None = None,
        *,
        name: str = "run",
        follow: bool = False,
        importance: str = "decode",
    ):
        """Nothing runs before `read`.

        Args:
            lm: the model.
            setup: a setup or a method; None is dense.
            name: what the run is called in figures.
            follow: whether a dense run is led along the same tokens, for KL and agreement; it takes as long again.
            importance: what is recorded of attention, as in `wb.Session`.
        """
        self.lm, self.name = lm, name
        _check_stepwise(setup)
        self.session = Session(lm, setup, importance=importance)
        self._dense = Session(lm) if follow else None
        self._quality: dict[int, tuple[float, bool]] = {}
        self._seen = _Seen(lm)

    @property
    def ended(self) -> bool:
        """Whether the last token ended the text."""
        return bool(self.session.tokens) and self.session.tokens[0][-1] in self.lm.end_tokens

    def read(self, prompt: Prompt) -> None:
        """Reads the prompt. Raises UserError as `Session.prefill` does, or for a batch."""
        self.session.prefill(prompt)
        if len(self.session.tokens) != 1:
            raise UserError(f"A live run shows one text, and {len(self.session.tokens)} were given.")
        if self._dense is not None:
            self._dense.prefill(self.session.tokens)

    def ask(self, text: Prompt) -> None:
        """Appends a further turn. Raises UserError as `Session.append` does."""
        self.session.append(text)
        self._follow(self.session.tokens[0][len(self._dense.tokens[0]) :] if self._dense is not None else [])

    def advance(self) -> int:
        """Decodes one token and returns its id. Raises UserError where the model's context ends."""
        self.session.step()
        token = self.session.tokens[0][-1]
        self._follow([token])
        return token

    def swap(self, setup: Setup | Method | None) -> None:
        """Puts another setup in charge from the next token on: see `Session.swap`."""
        _check_stepwise(setup)
        self.session.swap(setup)

    def branch(self, name: str) -> LiveRun:
        """An independent run that goes on from here and knows what was before; it costs a copy of the cache."""
        self._collect()
        other = copy.copy(self)
        other.name, other.session = name, self.session.branch()
        other._dense = self._dense.branch() if self._dense is not None else None
        other._quality = dict(self._quality)
        other._seen = self._seen.copy()
        return other

    def snapshot(self) -> Snapshot:
        """What there is to see now. It costs in proportion to what is new since the last one, and to the text's length."""
        self._collect()
        seen = self._seen
        history = seen.history()
        quality = [self._quality.get(step, (None, None)) for step in history["step"]]
        history["kl_to_dense"] = pd.array([kl for kl, _ in quality], dtype="Float64")
        history["agrees"] = pd.array([agrees for _, agrees in quality], dtype="boolean")
        return Snapshot(
            name=self.name,
            model=self.lm.name,
            setup=self.session.setup.label,
            history=history[list(HISTORY)],
            texts=tuple(seen.texts),
            phases=tuple(seen.phases),
            held=seen.held_share(),
            mass=seen.mass,
            experts=seen.experts,
            expert_layers=seen.expert_layers,
            swaps=seen.swaps,
        )

    def _follow(self, tokens: list[int]) -> None:
        """Leads the dense run along, and compares what both expect next."""
        if self._dense is None:
            return
        if len(tokens) == 1:
            self._dense.step(tokens)
        else:
            self._dense.append(tokens)
        dense, logits = self._dense.logits, self.session.logits
        step = self.session.steps - 1
        self._quality[step] = (float(kl_to_dense(dense, logits)), bool(top1_agreement(dense, logits)))

    def _collect(self) -> None:
        if self._seen.steps < self.session.steps:
            self._seen.add(self.session.trace.select(steps=range(self._seen.steps, self.session.steps)))


def _check_stepwise(setup: Setup | Method | None) -> None:
    """Raises UserError for a setup that does not go token by token."""
    decoding = Setup.of(setup).decoding
    if decoding is not None:
        raise UserError(
            f"{decoding.name!r} finds tokens in its own way, and a live run shows one step a token; compare it, or generate "
            "with a session, and leave it out here."
        )


class _Seen:
    """What was read off the trace so far: each step once."""

    def __init__(self, lm: LM):
        anatomy = lm.anatomy
        self._heads = [layer.attention.num_kv_heads for layer in anatomy.layers]
        self._windows = [layer.attention.window for layer in anatomy.layers]
        self.steps = 0
        self._parts: list[pd.DataFrame] = []
        self._gone = np.zeros((anatomy.num_layers, 0))
        self.texts: list[str] = []
        self.phases: list[str] = []
        self.mass: np.ndarray | None = None
        self.expert_layers = tuple(layer.index for layer in anatomy.layers if layer.experts is not None)
        widest = max((layer.experts.num_experts for layer in anatomy.layers if layer.experts is not None), default=0)
        self.experts = np.zeros((len(self.expert_layers), widest), dtype=int) if self.expert_layers else None
        self.swaps: tuple[tuple[int, str], ...] = ()

    def copy(self) -> _Seen:
        """An independent copy."""
        return copy.deepcopy(self)

    def add(self, trace: Trace) -> None:
        """Takes over new steps."""
        steps = trace.table("steps")
        self.steps = int(steps["step"].max()) + 1
        self._add_history(trace, steps)
        self._add_tokens(trace)
        self._add_evictions(trace)
        self._add_attention(trace)
        self._add_routing(trace)
        swapped = tuple((change["step"], change["to"]) for change in trace.meta["swaps"])
        self.swaps = tuple(dict.fromkeys([*self.swaps, *swapped]))

    def history(self) -> pd.DataFrame:
        """One row a forward call so far."""
        if len(self._parts) > 1:
            self._parts = [pd.concat(self._parts, ignore_index=True)]
        return self._parts[0].copy() if self._parts else pd.DataFrame(columns=list(HISTORY))

    def held_share(self) -> np.ndarray:
        """`[L, N]` share of the kv heads of each layer that hold each token; sliding layers hold their window."""
        share = 1 - self._gone / np.array(self._heads)[:, None]
        length = share.shape[1]
        for layer, window in enumerate(self._windows):
            if window is not None:
                share[layer, : max(0, length - window + 1)] = 0.0
        return share

    def _add_history(self, trace: Trace, steps: pd.DataFrame) -> None:
        held = cache_bytes(trace).rename(columns={"physical_bytes": "kv_physical_bytes", "nominal_bytes": "kv_nominal_bytes"})
        counts = trace.flops(by="step").merge(trace.bytes(by="step").rename(columns={"bytes": "moved_bytes"}), on="step")
        tokens = trace.table("tokens").drop_duplicates("step")[["step", "logprob", "entropy"]]
        tokens = tokens[tokens["step"].isin(steps.loc[steps["tokens"] == 1, "step"])]
        rows = steps[["step", "phase", "setup", "context", "duration_ns"]]
        for each in (held, counts, tokens):
            rows = rows.merge(each, on="step", how="left")
        self._parts.append(rows)

    def _add_tokens(self, trace: Trace) -> None:
        tokens = trace.table("tokens")
        self.texts += tokens["text"].tolist()
        self.phases += tokens["phase"].tolist()
        self._gone = np.pad(self._gone, ((0, 0), (0, len(self.texts) - self._gone.shape[1])))

    def _add_evictions(self, trace: Trace) -> None:
        evictions = trace.table("evictions")
        layer, head, position = (evictions[name].to_numpy() for name in ("layer", "head", "position"))
        count = np.where(head < 0, np.array(self._heads)[layer], 1)
        np.add.at(self._gone, (layer, position), count)

    def _add_attention(self, trace: Trace) -> None:
        importance = trace.table("importance")
        if importance.empty:
            return
        newest = importance[importance["step"] == importance["step"].max()]
        self.mass = np.zeros_like(self._gone)
        for row in newest.itertuples():
            share = mass_by_position(row) / (row.window * (newest["layer"] == row.layer).sum())
            self.mass[row.layer, row.start : row.start + row.length] += share

    def _add_routing(self, trace: Trace) -> None:
        routing = trace.table("routing")
        if self.experts is None or routing.empty:
            return
        routing = routing[routing["layer"].isin(self.expert_layers)]  # FFNs with branches are listed, too
        layer = routing["layer"].map({layer: number for number, layer in enumerate(self.expert_layers)})
        np.add.at(self.experts, (layer.to_numpy(), routing["expert"].to_numpy()), routing["tokens"].to_numpy())
