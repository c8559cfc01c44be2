"""UNComp: heads whose queries point many ways keep more. Xiong et al. 2024, arXiv 2410.03090."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from workbench.engine.calibration import Sample
from workbench.engine.policy import QUERIES, THINNING, LayerState, Side
from workbench.errors import UserError
from workbench.methods.base import Budget, budget_knob, knob, register
from workbench.methods.cache.base import (
    EVERY_STEP,
    CacheMethod,
    keep_top,
    observe_window,
    observing_cost,
    pool_scores,
    recent,
    reduce_heads,
)
from workbench.methods.cache.budgets import stage_size, stages, two_groups

_ROWS = "rows"


@register
@dataclass(frozen=True)
class UNComp(CacheMethod):
    """Keeps more in kv heads of high query entropy; what the last few queries attend to stays, chosen anew at every step."""

    name: ClassVar[str] = "uncomp"
    paper: ClassVar[str] = "Xiong et al. 2024, arXiv 2410.03090"
    acts: ClassVar[frozenset[str]] = EVERY_STEP
    observes: ClassVar[frozenset[str]] = EVERY_STEP
    ragged: ClassVar[bool] = True
    calibrated_by: ClassVar[tuple[str, ...]] = ("rank",)
    deviations: ClassVar[tuple[str, ...]] = (
        "Stages are off by default, so that the prompt's logits are the model's own. Their sizes scale with the prompt; the "
        "paper's code goes from the longest prompt of a run down to 1,536 tokens (of 3,950), which short contexts never reach.",
        "A stage begins where the entropy of a query head falls by more than 0.006 on average; the paper's code sums it over "
        "the 32 or 40 heads of its models, not divided by log D, and there the threshold is 1.",
        "The window's own tokens always go on, and at least as many as the high group keeps, so that every budget is met.",
        "Groups are of kv heads, by the mean entropy of their query heads, and their attention is averaged over the group "
        "before it is pooled; the paper's code stores K and V for every query head.",
        "The budget is the mean over heads and the groups' budgets follow from it and the ratio; the paper's code is given a "
        "number of which the groups get 3/2 and 3/4, and cuts the low group in half even if the prompt is short.",
        "Groups come from eight recall documents of 512 tokens by default, the paper's from 100 chunks of 4,096.",
        "The window is at most half of a head's budget, so that small budgets still choose.",
    )

    budget: Budget = budget_knob(0.2)
    window: int = knob(8, low=1, high=64, unit="tokens", help="Last queries whose attention counts; their own tokens stay.")
    kernel: int = knob(
        7, unit="tokens", help="Width of the max pooling that lifts a token's neighbours; odd.", choices=(1, 3, 5, 7, 9, 11, 13)
    )
    ratio: float = knob(2.0, low=1.0, high=64.0, help="How much more a head of high entropy keeps than one of low entropy.")
    rank: float = knob(0.25, low=0.01, high=1.0, unit="share of head size", help="Eigenvalues the entropy is taken over.")
    stages: bool = knob(False, help="Whether fewer and fewer tokens of the prompt go on from stage to stage of the layers.")
    fall: float = knob(0.006, low=0.0, high=1.0, help="A stage ends where the entropy of heads falls by more, on average.")
    least: float = knob(0.39, low=0.0, high=1.0, unit="share of prompt", help="Tokens that reach the last stage, at least.")

    @property
    def needs(self) -> frozenset[str]:
        """Queries, and thinning if there are stages."""
        return frozenset({QUERIES, THINNING}) if self.stages else frozenset({QUERIES})

    @property
    def side(self) -> Mapping[str, Side]:
        """Attention from each of the last queries, oldest first."""
        return {_ROWS: Side(shape=(self.window,))}

    def calibrate(self, samples: Iterable[Sample]) -> dict[str, torch.Tensor]:
        """`entropy` `[L, H]` of a kv head's queries, a text on average; `high` `[L, H]`, the half that is higher most often."""
        texts = []
        for sample in samples:
            by_head = [matrix_entropy(state.queries[0], self.rank) for state in sample.layers]
            texts.append(torch.stack([reduce_heads(each[None], sample.layers[0].keys.shape[1])[0] for each in by_head]).cpu())
        entropy = torch.stack(texts)
        votes = torch.stack([_upper_half(text) for text in texts]).double().mean(0)
        mean = entropy.mean(0)
        # Entropies are below one, so they only decide between heads that were voted for as often.
        return {"entropy": mean.float(), "high": _upper_half(votes * (2 * len(texts)) + mean)}

    def stage_by_layer(self, num_layers: int) -> list[int]:
        """The stage of each of the model's layers, from 0. Raises UserError if the entropy falls nowhere by enough."""
        by_acting = stages(self.tables["entropy"].mean(-1).tolist(), self.fall)
        if not by_acting[-1]:
            raise UserError(
                f"No layer's entropy is {self.fall} below the one before, so {self.name!r} has one stage; lower fall."
            )
        acting = self.calibration.layers
        return [
            max((stage for layer, stage in zip(acting, by_acting, strict=True) if layer <= index), default=0)
            for index in range(num_layers)
        ]

    def reach(self, prompt_tokens: int, num_layers: int) -> list[int]:
        """How many of a prompt's tokens reach each layer: all in the first stage, then evenly fewer."""
        labels = self.stage_by_layer(num_layers)
        capacity = self.capacity(prompt_tokens)
        high = max(
            max(two_groups(row, capacity, max(prompt_tokens, capacity), self.ratio)) for row in self.tables["high"].tolist()
        )
        least = min(max(round(self.least * prompt_tokens), self.window, high), prompt_tokens)
        return [stage_size(stage, labels[-1], least, prompt_tokens) for stage in labels]

    def thins_after(self, num_layers: int) -> tuple[int, ...]:
        """The last layer of each stage but the last."""
        labels = self.stage_by_layer(num_layers)
        return tuple(layer for layer in range(num_layers - 1) if labels[layer + 1] > labels[layer])

    def observe(self, state: LayerState) -> dict[str, torch.Tensor]:
        """The rows of the last queries: those of this call, and before them what is left of the earlier ones."""
        new = reduce_heads(observe_window(state, self.window), state.keys.shape[1])
        asking = state.positions[:, :1, -new.shape[2] :] >= 0
        earlier = state.side[_ROWS].movedim(3, 2)
        rows = torch.cat([earlier, new * asking[..., None]], 2)[:, :, -self.window :]
        return {_ROWS: rows.movedim(2, 3)}

    def observation_cost(self, state: LayerState) -> tuple[int, int]:
        """The window's queries of the call over the keys: `2 Hq W N D` FLOPs; keys read, rows written, earlier ones moved."""
        flops, moved = observing_cost(state, self.window)
        return flops, moved + 2 * state.side[_ROWS].nbytes

    def keep(self, state: LayerState) -> torch.Tensor:
        """The window, and before it what its queries attend to most, in each head as many as its group allows."""
        return self._keep(state, self._votes(state))

    def keep_and_pass(self, state: LayerState) -> tuple[torch.Tensor, torch.Tensor]:
        """The same, and the window and what its queries attend to most in all heads together, as many as reach a layer."""
        votes = self._votes(state)
        prompts = state.prompt_tokens.tolist()
        reached = [self.reach(tokens, state.num_layers)[state.layer + 1] for tokens in prompts]
        in_window = recent(state, torch.full_like(state.capacity, self.window))[:, :1]
        together = votes.sum(1, keepdim=True).masked_fill(in_window, torch.inf)
        passing = keep_top(together, torch.tensor(reached, device=votes.device), state.occupied[:, :1])
        return self._keep(state, votes), passing[:, 0]

    def _votes(self, state: LayerState) -> torch.Tensor:
        """`[B, H, N]` what each token got from the window's queries."""
        return state.side[_ROWS].movedim(3, 0).contiguous().sum(0)  # oldest query first, however long the cache is

    def _keep(self, state: LayerState, votes: torch.Tensor) -> torch.Tensor:
        counts, windows = self._counts(state)
        # Neighbours are those in the text, of the tokens held; pooling makes them equal, so ties break in that order, too.
        positions, order = state.positions.sort(dim=-1, stable=True)
        in_text = dataclasses.replace(state, positions=positions)
        in_window = recent(in_text, windows)
        pooled = pool_scores(votes.gather(-1, order).masked_fill(in_window | ~in_text.occupied, 0), "max", self.kernel)
        stays = keep_top(pooled.masked_fill(in_window, torch.inf), counts, in_text.occupied)
        return torch.empty_like(stays).scatter_(-1, order, stays)

    def scoring_cost(self, state: LayerState) -> tuple[int, int]:
        """The rows are read."""
        return 0, state.side[_ROWS].nbytes

    def _counts(self, state: LayerState) -> tuple[torch.Tensor, torch.Tensor]:
        """`[B, H]` tokens each head keeps, and `[B]` those of them that are the window."""
        high = self.table("high", state).tolist()
        prompts = state.prompt_tokens.tolist()
        rows = zip(state.capacity.tolist(), prompts, strict=True)
        counts = [two_groups(high, capacity, max(prompt, capacity), self.ratio) for capacity, prompt in rows]
        seen = [prompt + state.since_prompt for prompt in prompts]
        windows = [max(1, min(min(row) // 2, there, self.window)) for row, there in zip(counts, seen, strict=True)]
        return torch.tensor(counts, device=state.keys.device), torch.tensor(windows, device=state.keys.device)


def matrix_entropy(states: torch.Tensor, rank: float) -> torch.Tensor:
    """Truncated entropy `[...]` of states `[..., T, D]`: 0 if they all lie on one line, near 1 if they point anywhere.

    Of the covariance of the centred, normalised states, scaled to trace 1, the largest `rank` of its D eigenvalues count:
    `-sum s log s / log D`.
    """
    centred = states.double() - states.double().mean(-2, keepdim=True)
    unit = torch.nn.functional.normalize(centred, dim=-1)
    size = states.shape[-1]
    covariance = unit.transpose(-1, -2) @ unit
    covariance = covariance / covariance.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None].clamp(min=1e-10)
    values = torch.linalg.eigvalsh(covariance).flip(-1).clamp(min=1e-10)[..., : max(1, round(rank * size))]
    return -(values * values.log()).sum(-1) / math.log(size)


def _upper_half(scores: torch.Tensor) -> torch.Tensor:
    """`[L, H]` whether a head is in the upper half of its layer, the middle one of an odd number included."""
    rank = scores.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    return rank < (scores.shape[-1] + 1) // 2
