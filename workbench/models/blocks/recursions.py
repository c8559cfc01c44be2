"""Mixture-of-Recursions: the middle layers are one shared layer, which some tokens go through more often than others.

Source: Bae et al. 2025 (arXiv 2507.10524), the expert-choice file of its code. First and last layer are layers of their
own; each of the `Nr = L - 2` recursions keeps a share of the tokens that the one before it kept. Shapes: B rows, T tokens, d
hidden size.

NB: how many tokens a recursion keeps is asked of the device, so a GPU waits for the host once a recursion.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.blocks.attach import Forward, Progress

ALPHA = 0.1
"""Scale of a router's weight."""
AUXILIARY = 0.001
"""Weight of the loss that teaches a router's sign whether it would choose."""
_TOP_K = ("prefill", "append")
"""Phases in which tokens are chosen among those of the call; elsewhere a token is judged alone."""


def shares(recursions: int) -> list[float]:
    """Share of the tokens that each recursion keeps: `(Nr - r) / Nr`."""
    return [(recursions - number) / recursions for number in range(recursions)]


def num_kept(share: float, tokens: int) -> int:
    """`max(1, int(share * tokens))`, and no token of a row that has none."""
    return min(tokens, max(1, int(share * tokens + 1e-9)))


def chosen(scores: torch.Tensor, among: torch.Tensor, counts: Sequence[int]) -> torch.Tensor:
    """`[B, T]` the `counts[b]` tokens of highest score among those of a mask `[B, T]`."""
    order = scores.float().masked_fill(~among, -torch.inf).argsort(dim=1, descending=True, stable=True)
    rank = order.argsort(dim=1)
    return (rank < torch.tensor(counts, device=scores.device)[:, None]) & among


def recursed(stream: torch.Tensor, index: torch.Tensor, weights: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
    """The stream `[B, T, d]` with `weights * out` `[B, k, d]` added to the tokens `index` `[B, k]`; the others stay.

    A weight of 0 stands for none: what is there only to fill up a row changes nothing, whatever came out for it.
    """
    added = (weights[..., None] * out).masked_fill((weights == 0)[..., None], 0)
    return stream.scatter_add(1, index[..., None].expand_as(out), added.to(stream.dtype))


def own_layer(layer: nn.Module) -> nn.Module:
    """A layer like another, its weights a copy, and nothing on it of what may hang on that one."""
    with torch.device("meta"):
        own = type(layer)(layer.self_attn.config, layer.self_attn.layer_idx)
    own.load_state_dict({name: tensor.detach().clone() for name, tensor in layer.state_dict().items()}, assign=True)
    return own.requires_grad_(True)


def weights_in_place(layer: nn.Module, own: nn.Module) -> dict[nn.Module, Forward]:
    """What makes a layer compute with the weights of another: that one's matrices and norms in place of its own."""
    return {
        part: _instead(own.get_submodule(name))
        for name, part in layer.named_modules()
        if next(part.parameters(recurse=False), None) is not None
    }


def _instead(own: nn.Module) -> Forward:
    return lambda _, *args, **kwargs: own(*args, **kwargs)


class RecursionBlock(nn.Module):
    """The first layer, the shared one and the last, and a router for each recursion."""

    def __init__(self, layers: Sequence[nn.Module], alpha: float = ALPHA):
        super().__init__()
        self.first, self.shared, self.last = (own_layer(layers[index]) for index in (0, 1, -1))
        with torch.no_grad():  # so that what an undecided router lets through is about what the layer gave
            for part in (self.shared.self_attn.o_proj, self.shared.mlp.down_proj):
                part.weight.mul_(2 / alpha)
        recursions = len(layers) - 2
        self.routers = nn.ParameterList(
            nn.Parameter(0.02 * torch.randn_like(self.shared.input_layernorm.weight)) for _ in range(recursions)
        )
        self.alpha = alpha
        self.shares = shares(recursions)
        self.auxiliary: list[torch.Tensor] = []
        """While training, the loss of each recursion's router in the last call."""

    def auxiliary_loss(self) -> torch.Tensor:
        """What the last call's routers lose by not knowing whom they chose."""
        return AUXILIARY * torch.stack(self.auxiliary).sum()

    def forwards(
        self, layers: Sequence[nn.Module], call: Progress | None = None, by_rank: bool = True
    ) -> Mapping[nn.Module, Forward]:
        """What runs in place of the layers' weights, and of the middle layers: see `Recursions`.

        If `by_rank`, prompts keep their best tokens, else those that a router would keep each for itself.
        """
        own = [self.first, *[self.shared] * (len(layers) - 2), self.last]
        found = Recursions(self, layers, call, by_rank).forwards()
        for layer, of_layer in zip(layers, own, strict=True):
            found |= weights_in_place(layer, of_layer)
        return found


class Recursions:
    """The recursions of a call, one in place of each middle layer, whose place in the cache it takes.

    A recursion runs the shared layer on the tokens it keeps, which alone attend and are cached, at their own positions.
    """

    def __init__(self, block: RecursionBlock, layers: Sequence[nn.Module], call: Progress | None, by_rank: bool):
        self._block, self._call, self._by_rank = block, call, by_rank
        self._middle = list(layers[1:-1])
        self._kept: torch.Tensor | None = None

    def forwards(self) -> dict[nn.Module, Forward]:
        """By middle layer."""
        return {layer: self._recursion(number) for number, layer in enumerate(self._middle)}

    def _recursion(self, number: int) -> Forward:
        def forward(original: Forward, stream: torch.Tensor, *args, **kwargs):
            block, call = self._block, self._call
            there = torch.ones(stream.shape[:2], dtype=torch.bool, device=stream.device)
            if call is not None and call.has_padding:
                there = call.positions >= 0
            candidates = there if number == 0 else self._kept
            logits = stream @ block.routers[number].to(stream.dtype)
            kept = self._kept = self._choose(number, logits, candidates)
            if block.training:
                wanted = kept[candidates].float()
                block.auxiliary = block.auxiliary if number else []
                block.auxiliary.append(F.binary_cross_entropy_with_logits(logits[candidates].float(), wanted))
            if call is not None:
                self._tell(number, stream, kept, logits)
            most = int(kept.sum(1).max())
            if not most:
                return stream
            index = kept.to(torch.int8).argsort(dim=1, stable=True)[:, kept.shape[1] - most :]
            weights = block.alpha * logits.gather(1, index).sigmoid() * kept.gather(1, index)
            gathered = _gathered(kwargs, index, stream.shape[1])
            states = stream.gather(1, index[..., None].expand(*index.shape, stream.shape[-1]))
            return recursed(stream, index, weights, self._run(original, kept, states, args, gathered))

        return forward

    def _run(self, layer: Forward, kept: torch.Tensor, states: torch.Tensor, args: tuple, kwargs: dict) -> torch.Tensor:
        """The shared layer on the kept tokens, while the call has no others."""
        call = self._call
        if call is None:
            return layer(states, *args, **kwargs)
        before = call.positions, call.has_padding, call.thinned
        call.thin(kept)
        try:
            return layer(states, *args, **kwargs)
        finally:
            call.positions, call.has_padding, call.thinned = before

    def _choose(self, number: int, logits: torch.Tensor, among: torch.Tensor) -> torch.Tensor:
        """`[B, T]` the tokens a recursion keeps."""
        share = self._block.shares[number]
        if share == 1:
            return among
        a_prompt = self._call is None or self._call.phase in _TOP_K
        if not (self._block.training or (self._by_rank and a_prompt)):
            return among & (logits >= 0)  # sigmoid(logit) >= 0.5
        there = self._call.positions >= 0 if self._call is not None else torch.ones_like(among)
        return chosen(logits, among, [num_kept(share, tokens) for tokens in there.sum(1).tolist()])

    def _tell(self, number: int, stream: torch.Tensor, kept: torch.Tensor, logits: torch.Tensor) -> None:
        """Writes the router's work, and which tokens take this recursion: the others are dropped from it."""
        call, block = self._call, self._block
        layer = self._middle[number].self_attn.layer_idx
        size, weights = stream.element_size(), stream.shape[-1] * stream.element_size()
        tokens, read = kept.numel(), stream.numel() * size + weights
        call.work(layer, "method", changed=tokens, flops=2 * stream.numel(), bytes=read, weight_bytes=weights)
        recursions = len(block.shares)
        experts = torch.where(kept, number, recursions).view(-1, 1)
        call.routed(layer, recursions, experts, (block.alpha * logits.float().sigmoid() * kept).view(-1, 1))


def _gathered(given: dict, index: torch.Tensor, tokens: int) -> dict:
    """Arguments of a layer, where they have one entry a token `[B or 1, T, ...]`, of the tokens `index` `[B, k]` alone."""

    def taken(value):
        if isinstance(value, tuple):
            return tuple(map(taken, value))
        if not isinstance(value, torch.Tensor) or value.ndim not in (2, 3) or value.shape[1] != tokens:
            return value
        whole = value.expand(len(index), *value.shape[1:])
        which = index.view(*index.shape, *(1,) * (value.ndim - 2))
        return whole.gather(1, which.expand(*index.shape, *value.shape[2:]))

    return {name: taken(value) for name, value in given.items()}
