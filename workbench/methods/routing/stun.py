"""STUN: experts that fire together become one, then weights of small effect become zero. Lee et al. 2024, arXiv 2409.06211."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import nn

from workbench.engine.banks import banks_of
from workbench.engine.calibration import Samples
from workbench.engine.clusters import Clusters, clustered_to
from workbench.engine.experts import Bank, Routed, RouteState, alone
from workbench.engine.neurons import Neurons, neurons
from workbench.engine.parts import PartsBank
from workbench.engine.routed import routed
from workbench.methods.base import knob, register
from workbench.methods.routing.base import ExpertMethod, within
from workbench.models.anatomy import expert_modules, router_modules
from workbench.trace.anatomy import Anatomy

if TYPE_CHECKING:
    from workbench.models.load import LM


@dataclass(frozen=True)
class Merged:
    """What became of one layer's experts."""

    clusters: Clusters
    averaged: bool
    """Whether a cluster's expert is the mean of its members, or one of them."""
    representatives: tuple[int, ...]
    """Whose number the expert of each cluster goes by: the member it is, or the first."""

    def over_experts(self, values: torch.Tensor, gone: float) -> torch.Tensor:
        """`[..., E]` of its members' values what a cluster has, the mean or its own, at its place; `gone` elsewhere."""
        places = torch.tensor(self.representatives, device=values.device)
        means = [values[..., members].mean(-1) for members in self.clusters] if self.averaged else []
        left = torch.stack(means, -1) if self.averaged else values[..., places]
        return torch.full_like(values, gone).index_copy(-1, places, left)


@register
@dataclass(frozen=True)
class STUN(ExpertMethod):
    """Makes one expert of those that often fire together, then zeros the weights that matter least to what they multiply.

    Experts that are merged away are really gone. Zeros are not: weights are stored and read densely, zeros and all, so they
    cost quality and save no byte here; `zeros` counts them.
    """

    name: ClassVar[str] = "stun"
    paper: ClassVar[str] = "Lee et al. 2024, arXiv 2409.06211"
    calibrated_by: ClassVar[tuple[str, ...]] = ()
    calibrated_on: ClassVar[str] = "recall and prose"
    sweep: ClassVar[tuple[Mapping[str, Any], ...]] = tuple(
        {"kept": kept, "sparsity": 0.0, "mix": 10.0} for kept in (0.9, 0.75, 0.6, 0.5)
    )
    deviations: ClassVar[tuple[str, ...]] = (
        "The number of experts asked for is met exactly: at the lowest threshold that leaves no more, merging stops there; the "
        "paper's code takes what its binary search ends with.",
        "Distances are scaled by the mean co-activation of two different experts of the layer.",
        "The zeros are Wanda's, by what experts were given before they were merged: a cluster its members' inputs together; no "
        "second run over the merged model is made, and OWL's shares by layer are left out.",
        "The router runs whole, and the logits of averaged rows are the mean of its logits. Where the gate chooses groups of "
        "experts first, a cluster stands in the group of the expert it goes by.",
        "A layer with fewer experts than a token is given gives it all of them.",
    )

    kept: float = knob(0.8, low=0.0, high=1.0, help="Share of all experts that stay, over all layers; at least one a layer.")
    sparsity: float = knob(0.4, low=0.0, high=1.0, help="Share of the experts' weights gone or zero in the end.")
    mix: float = knob(0.0, low=0.0, help="Weight of the distance of router rows beside co-activation.")
    averaged: int = knob(2, low=0, unit="clusters", help="Most clusters of a layer whose members are averaged.")

    @classmethod
    def identity(cls, anatomy: Anatomy) -> Self:
        """All experts stay, and all weights."""
        return cls(kept=1.0, sparsity=0.0)

    def calibrate(self, samples: Samples) -> dict[str, torch.Tensor]:
        """Tables by layer with experts, how its experts resemble each other, and the size of what they multiply.

        `together` `[L, E, E]` tokens whose two best experts these are; `rows` and `weights` `[L, E, E]` distances of router
        rows, and squared ones of all weights; `outer` `[L, E, d]` and `inner` `[L, E, f]` sums of squares of an expert's
        inputs, and of its neurons.
        """
        modules = expert_modules(samples.lm.model)
        layouts = {layer: neurons(module) for layer, module in modules.items()}
        sums: dict[int, tuple[torch.Tensor, ...]] = {}
        for done, document in enumerate(samples.documents, 1):
            for layer, state in routed(samples.lm, document.tokens)[0].items():
                found = (_together(state), *_squares(layouts[layer], state))
                sums[layer] = tuple(map(torch.add, sums[layer], found)) if layer in sums else found
            samples.advance(done, len(samples.documents))
        together, outer, inner = (torch.stack(parts).cpu() for parts in zip(*(sums[layer] for layer in modules), strict=True))
        routers = router_modules(samples.lm.model)
        rows = torch.stack([torch.cdist(*[routers[layer].weight.float()] * 2) for layer in modules])
        weights = torch.stack([_apart(module) for module in modules.values()])
        return {"together": together, "outer": outer, "inner": inner, "rows": rows, "weights": weights}

    @cached_property
    def merged(self) -> tuple[Merged, ...]:
        """What becomes of the experts of each layer that has some."""
        together = self.tables["together"].float()
        num_layers, count = together.shape[:2]
        mean = together.sum((1, 2)) / (count * (count - 1))  # the diagonal is empty
        distances = -together / mean.clamp(min=torch.finfo().tiny)[:, None, None] + self.mix * self.tables["rows"]
        clusters, _ = clustered_to(distances, max(num_layers, round(self.kept * num_layers * count)))
        return tuple(self._merged(each, apart) for each, apart in zip(clusters, self.tables["weights"], strict=True))

    def _merged(self, clusters: Clusters, apart: torch.Tensor) -> Merged:
        """The expert nearest to a cluster's centroid is the one with the least squared distance to all of it."""
        if len(clusters) <= self.averaged:
            return Merged(clusters, True, tuple(members[0] for members in clusters))
        nearest = (members[int(apart[members][:, members].sum(-1).argmin())] for members in clusters)
        return Merged(clusters, False, tuple(nearest))

    def route(self, state: RouteState) -> Routed | None:
        """The best of the experts that are left, by the logits of theirs or the mean of their members'."""
        merged, gate = self.merged[state.number], state.gate
        if len(merged.clusters) == state.num_experts:
            return None
        logits = merged.over_experts(state.logits, -torch.inf)
        if gate.bias is not None:
            gate = dataclasses.replace(gate, bias=merged.over_experts(gate.bias, 0.0))
        left = dataclasses.replace(state, logits=logits, gate=gate)
        return within(left, logits > -torch.inf, state.experts.shape[-1])

    def banks(self, lm: LM) -> Mapping[int, Bank]:
        """The experts that are left, in layers where something changes."""
        found, share = {}, self._share_of_zeros()
        for (number, merged), (layer, module) in zip(enumerate(self.merged), expert_modules(lm.model).items(), strict=True):
            if len(merged.clusters) < len(module.down_proj) or share:
                inputs = [self.tables[name][number].to(module.down_proj.device) for name in ("outer", "inner")]
                found[layer] = _bank(neurons(module), merged, *inputs, share)
        return found

    def zeros(self, lm: LM) -> int:
        """Weights of experts that are there and zero."""
        parts = [part for bank in banks_of(self, lm).values() for part in bank.parts if part is not None]
        matrices = [weight for part in parts for _, weight in part.named_parameters(recurse=False) if weight.ndim == 3]
        return sum(int((matrix == 0).sum()) for matrix in matrices)

    def _share_of_zeros(self) -> float:
        """Of the experts that are left, so that `sparsity` of all weights is gone or zero."""
        left = sum(len(each.clusters) for each in self.merged) / self.tables["together"].shape[:2].numel()
        return max(0.0, 1 - (1 - self.sparsity) / left)


def _bank(layout: Neurons, merged: Merged, outer: torch.Tensor, inner: torch.Tensor, share: float) -> PartsBank:
    """One layer's experts after both stages; `outer` and `inner` are sums of squares of inputs by expert."""
    parts: list[nn.Module | None] = [None] * len(layout.module.down_proj)
    for members, number in zip(merged.clusters, merged.representatives, strict=True):
        made_of = members if merged.averaged else [number]
        weights = _mean(layout.module, made_of) if share or len(made_of) > 1 else {}
        squares = outer[members].sum(0), inner[made_of].sum(0)
        parts[number] = alone(layout.module, number, **_sparse(layout, weights, *squares, share))
    return PartsBank(parts)


def _together(state: RouteState) -> torch.Tensor:
    """`[E, E]` tokens whose two best experts these are, both ways round."""
    best = state.gate.ranking(state.logits).topk(2, dim=-1).indices
    chosen = torch.zeros_like(state.logits).scatter_(-1, best, 1.0)
    both = chosen.T @ chosen
    return (both - both.diag().diag()).to(torch.int32)


def _squares(layout: Neurons, state: RouteState) -> tuple[torch.Tensor, torch.Tensor]:
    outer, inner = [], []
    for expert in range(state.num_experts):
        hidden = state.hidden[(state.experts == expert).any(-1)]
        outer.append(hidden.float().square().sum(0))
        inner.append(layout.inner(expert, hidden).float().square().sum(0))
    return torch.stack(outer), torch.stack(inner)


def _apart(module: nn.Module) -> torch.Tensor:
    """`[E, E]` squared distances of experts, all weights together."""
    return sum(torch.cdist(*[weight.flatten(1).float()] * 2).square() for _, weight in module.named_parameters(recurse=False))


def _mean(module: nn.Module, members: list[int]) -> dict[str, torch.Tensor]:
    """The mean weights `[1, ...]` of some experts, in memory of their own."""
    stacked = [(name, weight) for name, weight in module.named_parameters(recurse=False) if weight.ndim > 1]
    return {name: weight[members].mean(0, keepdim=True) for name, weight in stacked}


def _sparse(
    layout: Neurons, weights: dict[str, torch.Tensor], outer: torch.Tensor, inner: torch.Tensor, share: float
) -> dict[str, torch.Tensor]:
    """Sets the share of each output's weights to zero for which `|w| |x|` is least (Wanda, Sun et al., arXiv 2306.11695)."""
    sparse = dict(weights)
    for name, weight in weights.items():
        if weight.ndim != 3:
            continue
        is_down = name == "down_proj"
        axis = layout.axes[name] if is_down else 3 - layout.axes[name]  # that of the inputs
        size = [1, 1, 1]
        size[axis] = -1
        effect = weight.float().abs() * (inner if is_down else outer).sqrt().view(size)
        least = effect.argsort(dim=axis, stable=True).narrow(axis, 0, round(share * weight.shape[axis]))
        sparse[name] = weight.scatter(axis, least, 0.0)
    return sparse
