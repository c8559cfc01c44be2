"""How a model's gate makes weights of logits, found by trying: what a method must know to route tokens anew.

Families differ in what scores a logit (softmax over all experts, sigmoid), in whether the weights of the chosen are made to
sum to one, in a factor, a bias that counts for the choice alone, and in groups of experts that are chosen first. Which of
these a model does is found on a short text: the rule that gives the model's own choices and weights back.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from workbench.engine.check import tolerance
from workbench.errors import UserError
from workbench.models.anatomy import decoder_layers, router_modules
from workbench.probes.moe import Choice, RoutingProbe
from workbench.probes.unobserved import unobserved

if TYPE_CHECKING:
    from workbench.models.load import LM

_LENGTH = 24
_MOSTLY = 0.75
"""Share of tokens whose choice a rule has to give back where a model scores in half precision, in which near scores tie."""
_GROUPS = (("n_group", "num_group"), ("topk_group",))
"""What families call the number of groups of experts, and of those a token may choose from."""

_known: weakref.WeakKeyDictionary[nn.Module, dict[int, Gate]] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Gate:
    """One layer's rule. Shapes: T tokens, E experts, k chosen."""

    score: str
    """`softmax` over all experts, or `sigmoid`."""
    renormalises: bool
    """Whether the weights of a token's experts sum to `scale`."""
    scale: float
    bias: torch.Tensor | None = None
    """`[E]` added to the scores for the choice alone (DeepSeek-V3, arXiv 2412.19437, equation 16)."""
    groups: tuple[int, int] = (1, 1)
    """Groups of experts, and how many of them a token may choose from: those with the largest sum of two."""

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """`[T, E]` float32."""
        logits = logits.float()
        return logits.softmax(-1) if self.score == "softmax" else logits.sigmoid()

    def ranking(self, logits: torch.Tensor) -> torch.Tensor:
        """`[T, E]`: the model chooses the largest; -inf in a group that is not chosen."""
        scores = self.scores(logits)
        if self.bias is not None:
            scores = scores + self.bias.float()
        count, chosen = self.groups
        if count == chosen:
            return scores
        grouped = scores.unflatten(-1, (count, -1))
        best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1).topk(chosen, dim=-1).indices
        allowed = torch.zeros_like(grouped[..., 0], dtype=torch.bool).scatter(-1, best, True)
        return grouped.masked_fill(~allowed[..., None], -torch.inf).flatten(-2)

    def weights(self, logits: torch.Tensor, experts: torch.Tensor) -> torch.Tensor:
        """`[T, k]` weights of some experts of each token; 0 where the number is that of no expert (a slot left out)."""
        count = logits.shape[-1]
        scores = self.scores(logits).gather(-1, experts.clamp(max=count - 1)).masked_fill(experts >= count, 0)
        if self.renormalises:
            scores = scores / scores.sum(-1, keepdim=True).clamp(min=1e-20)
        return scores * self.scale


def gates(lm: LM) -> dict[int, Gate]:
    """The gate of every layer with experts. Raises UserError if one follows no rule known here."""
    if lm.model not in _known:
        found = {choice.layer: _found(lm, choice) for choice in _tried(lm)}
        missed = [layer.index for layer in lm.anatomy.layers if layer.experts is not None and layer.index not in found]
        if missed:
            raise UserError(_refusal(lm, missed[0], "which experts it calls is not among their arguments"))
        _known[lm.model] = found
    return _known[lm.model]


@torch.no_grad()
def _tried(lm: LM) -> list[Choice]:
    """What a short text is routed to, with logits."""
    ids = torch.arange(2, 2 + _LENGTH, device=lm.device)[None] * 7 % lm.anatomy.vocab_size
    probe = RoutingProbe(lm.model, "logits")
    with unobserved():
        try:
            probe.attach()
            lm.model(input_ids=ids, use_cache=False)
        finally:
            probe.detach()
    return probe.take()


def _found(lm: LM, choice: Choice) -> Gate:
    if choice.logits is None:
        raise UserError(_refusal(lm, choice.layer, "its router was not found"))
    near = tolerance(lm.model)
    experts, weights = choice.experts.flatten(0, -2), choice.weights.flatten(0, -2).float()
    fitting: list[tuple[float, float, Gate]] = []
    for score, bias in itertools.product(("softmax", "sigmoid"), (None, _choice_bias(lm.model, choice.layer))):
        for groups in dict.fromkeys(((1, 1), _groups(lm.model, choice.layer))):
            best = Gate(score, False, 1.0, bias, groups).ranking(choice.logits).topk(experts.shape[-1], dim=-1).indices
            alike = (best.sort(-1).values == experts.sort(-1).values).all(-1).float().mean().item()
            if alike < (_MOSTLY if lm.anatomy.element_bytes < 4 else 1):
                continue
            for renormalises in (True, False):
                plain = Gate(score, renormalises, 1.0, bias, groups)
                scale = float((weights.sum() / plain.weights(choice.logits, experts).sum()).item())
                whole = Gate(score, renormalises, 1.0 if abs(scale - 1) < near else scale, bias, groups)
                given = whole.weights(choice.logits, experts)
                if torch.allclose(given, weights, rtol=near, atol=near):
                    fitting.append((alike, -float((given - weights).abs().sum()), whole))
    if fitting:
        return max(fitting, key=lambda each: each[:2])[-1]
    raise UserError(_refusal(lm, choice.layer, "neither softmax nor sigmoid of its logits gives its choices and weights back"))


def _choice_bias(model: nn.Module, layer: int) -> torch.Tensor | None:
    """A bias over experts, beside the router's own, in the layer's MoE block."""
    router = router_modules(model)[layer]
    count = router.weight.shape[0]
    named = itertools.chain(decoder_layers(model)[layer].named_buffers(), decoder_layers(model)[layer].named_parameters())
    return next((each for name, each in named if each.shape[-1:] == (count,) and "correction" in name), None)


def _groups(model: nn.Module, layer: int) -> tuple[int, int]:
    for module in decoder_layers(model)[layer].modules():
        count, chosen = (next((value for name in names if (value := getattr(module, name, None))), 1) for names in _GROUPS)
        if count > 1:
            return count, chosen
    return 1, 1


def _refusal(lm: LM, layer: int, why: str) -> str:
    return f"Tokens of {lm.name} cannot be routed anew: in layer {layer}, {why}; choose a method that keeps its choices."
