"""CompressKV: a few heads that find facts again choose for all. Lin et al. 2025, arXiv 2508.02401."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from workbench.engine.calibration import Sample
from workbench.engine.policy import QUERIES, LayerState
from workbench.errors import UserError
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import CacheMethod, keep_top, pool_scores, recent
from workbench.methods.cache.budgets import by_error
from workbench_kernels.attention_rows import attention_rows

_MOST = 3
"""A layer's budget is at most this many times the mean."""


@register
@dataclass(frozen=True)
class CompressKV(CacheMethod):
    """Keeps what a layer's best retrieval heads look at, the same tokens in all heads, and more where dropping hurts more."""

    name: ClassVar[str] = "compress-kv"
    paper: ClassVar[str] = "Lin et al. 2025, arXiv 2508.02401"
    needs: ClassVar[frozenset[str]] = frozenset({QUERIES})
    calibrated_by: ClassVar[tuple[str, ...]] = ("heads", "window", "kernel", "least")
    deviations: ClassVar[tuple[str, ...]] = (
        "Heads are ranked on recalled facts by teacher forcing, on the fact's value; the paper's code lets the model answer "
        "needle prompts and keeps those it answers well, and takes the whole sentence.",
        "A layer's error is that of all tokens after a calibration prompt, one forward over them and not step by step.",
        "No layer is given more tokens than the prompt has, and least is at most the budget: every budget is met exactly.",
        "The window is at most half the budget, so that small budgets still choose; the paper's code needs more than it.",
    )

    budget: Budget = budget_knob(0.2)
    heads: int = knob(4, low=1, high=256, help="Query heads of a layer that choose: those that find facts again best.")
    window: int = knob(8, low=1, high=1024, unit="tokens", help="Last queries that vote; their own tokens always stay.")
    kernel: int = knob(
        5, unit="tokens", help="Width of the pooling that lifts a token's neighbours; odd.", choices=(1, 3, 5, 7, 9, 11, 13)
    )
    least: int = knob(32, low=1, high=4096, unit="tokens", help="What a layer keeps at least.")

    def calibrate(self, samples: Iterable[Sample]) -> dict[str, torch.Tensor]:
        """`retrieval` `[L, Hq]`, how well a head finds facts again, and `errors` `[L]`, a layer's part of what is lost."""
        retrieval = _mean([_retrieval(sample) for sample in samples if sample.document.needles])
        if retrieval is None:
            raise UserError(f"No text of the calibration of {self.name!r} has a needle; give documents with needles.")
        errors = _mean([self._errors(sample, retrieval) for sample in samples])
        return {"retrieval": retrieval, "errors": errors}

    def allocate(self, prompt_tokens: int, num_layers: int) -> list[int]:
        """Each layer gets the least, and of the rest its share of the error."""
        capacity = self.capacity(prompt_tokens)
        if capacity >= prompt_tokens:
            return [capacity] * num_layers
        most = min(_MOST * capacity, prompt_tokens)
        return by_error(self.tables["errors"].tolist(), capacity, min(self.least, capacity), most)

    def keep(self, state: LayerState) -> torch.Tensor:
        """The window, and before it the tokens the layer's best heads look at; the same in all kv heads."""
        return self._chosen(state, self._best(self.table("retrieval", state)))

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """The window's queries of the chosen heads over their keys: `2 heads W N D` FLOPs; their keys read, scores written."""
        batch, num_q_heads, there, head_dim = state.queries.shape
        heads, num_slots = min(self.heads, num_q_heads), state.keys.shape[2]
        scores = batch * heads * min(int(self._windows(state).max()), there) * num_slots
        return 2 * scores * head_dim, batch * heads * num_slots * head_dim * state.keys.element_size() + 4 * scores

    def _best(self, retrieval: torch.Tensor) -> torch.Tensor:
        """The query heads of highest score, `[heads]`; of equal ones the first."""
        return retrieval.argsort(descending=True, stable=True)[: self.heads]

    def _chosen(self, state: LayerState, heads: torch.Tensor) -> torch.Tensor:
        windows = self._windows(state)
        in_window = recent(state, windows)
        votes = head_votes(state, heads, windows)
        group = state.queries.shape[1] // state.keys.shape[1]
        pooled = pool_scores(votes.masked_fill(in_window[:, heads // group], 0), "avg", self.kernel)
        scores = pooled.mean(1, keepdim=True).expand(state.positions.shape).masked_fill(in_window, torch.inf)
        return keep_top(scores, state.capacity, state.occupied)

    def _windows(self, state: LayerState) -> torch.Tensor:
        """`[B]` last tokens that stay in each row; those of this call vote with their queries."""
        return torch.minimum(state.capacity // 2, state.newest.view(-1) + 1).clamp(1, self.window)

    def _errors(self, sample: Sample, retrieval: torch.Tensor) -> torch.Tensor:
        """`[L]` how far the output of each layer is off after a prompt compressed to `least` tokens; they sum to one."""
        errors = []
        for state, prompt, heads, project in zip(sample.layers, sample.prompts(), retrieval, sample.projections, strict=True):
            at_least = replace(prompt, capacity=torch.full_like(prompt.capacity, self.least))
            kept = self._chosen(at_least, self._best(heads.to(prompt.keys.device)))
            errors.append(_output_error(state, kept, project))
        found = torch.stack(errors)
        return found / found.sum().clamp(min=torch.finfo(found.dtype).tiny)


def head_votes(state: LayerState, heads: torch.Tensor, windows: torch.Tensor) -> torch.Tensor:
    """`[B, K, N]` attention of K query heads alone, summed over the last `windows[b]` queries of each row."""
    group = state.queries.shape[1] // state.keys.shape[1]
    occupied = state.occupied[:, heads // group] if bool((state.positions < 0).any()) else None
    queries = state.queries[:, heads, -int(windows.max()) :]
    attention = attention_rows(queries, state.keys[:, heads // group], state.scaling, occupied=occupied).squeeze(2)
    voting = attention.shape[2]  # of a decode step that decides after a swap there is one query
    votes = torch.arange(voting, device=windows.device) >= voting - windows.view(-1, 1)
    return (attention * votes[:, None, :, None]).sum(2)


def _retrieval(sample: Sample) -> torch.Tensor:
    """`[L, Hq]` attention that the queries about to repeat a needle put on it, a needle on average.

    A query counts once for each place at which the needle holds the token that comes next.
    """
    document = sample.document
    first = min(min(needle.asking) for needle in document.needles)
    rows = []
    for state in sample.layers:
        attention = attention_rows(state.queries[:, :, first:], state.keys, state.scaling)[0].flatten(0, 1)
        found = attention.new_zeros(attention.shape[0])
        for needle in document.needles:
            passage = document.tokens[needle.start : needle.stop]
            for position in needle.asking:
                times = passage.count(document.tokens[position + 1])
                found += times * attention[:, position - first, needle.start : needle.stop].sum(-1)
        rows.append(found / len(document.needles))
    return torch.stack(rows).cpu()


def _output_error(state: LayerState, kept: torch.Tensor, project) -> torch.Tensor:
    """`|o' - o| / |o|` of the projected output o of each token after the prompt, summed over them; `kept` `[1, H, P]`."""
    prompt = kept.shape[2]
    rows = attention_rows(state.queries[:, :, prompt:], state.keys, state.scaling)
    held = torch.nn.functional.pad(kept, (0, rows.shape[-1] - prompt), value=True)[:, :, None, None]
    seen = rows * held
    outputs = [weights @ state.values.float()[:, :, None] for weights in (rows, seen / seen.sum(-1, keepdim=True))]
    dense, compressed = (project(output.permute(0, 3, 1, 2, 4).flatten(2).to(state.values.dtype)).float() for output in outputs)
    return ((compressed - dense).norm(dim=-1) / (dense.norm(dim=-1) + 1e-5)).sum().cpu()


def _mean(tables: list[torch.Tensor]) -> torch.Tensor | None:
    return torch.stack(tables).mean(0) if tables else None
