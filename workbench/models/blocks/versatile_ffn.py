"""VersatileFFN: one gated FFN used as eight narrow experts and as a loop of up to four passes.

Source: huawei-noah/noah-research, VersatileFFN (arXiv 2512.14531). Shapes: T tokens, d hidden size, f inner size.

All is said as what is added to the residual stream x after attention, so that the layer's own addition stays. As the two
weights of the slices sum to one, `sum w_i (x + FFN_i(norm x)) = x + sum w_i FFN_i(norm x)`.

NB: which tokens take part in a pass or a slice is asked of the device each time, so a GPU waits for the host in between.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.blocks.attach import Forward, Progress

SLICES, ACTIVE, MAX_LOOPS = 8, 2, 4
"""Narrow experts, how many of them serve a token, and the most passes: constants of the paper's code."""
TAU = 5.0, 0.1
"""Temperature of the Gumbel softmax at the start and at the end of training."""


def fusion(loops: torch.Tensor) -> torch.Tensor:
    """The weight of the wide path: `(4 - loops) / 4`, 0 for a token that takes all four passes."""
    return (MAX_LOOPS - loops) / MAX_LOOPS


@dataclass(frozen=True)
class Served:
    """What a layer computed for the tokens of a call."""

    passes: int
    """FFN passes, over tokens."""
    easy: int
    """Tokens of the wide path: those that do not take all passes."""
    slices: torch.Tensor
    """`[T, 2]` the slices that served each, -1 for none."""
    weights: torch.Tensor
    """`[T, 2]` and their weights in what was added."""


class VersatileLayer(nn.Module):
    """One layer's FFN and the two gates on it."""

    def __init__(self, mlp: nn.Module):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = (
            nn.Parameter(getattr(mlp, name).weight.detach().clone()) for name in ("gate_proj", "up_proj", "down_proj")
        )
        hidden = self.gate_proj.shape[1]
        self.activation = mlp.act_fn
        self.expert_gate = nn.Linear(hidden, SLICES, bias=False)
        self.depth_predictor = nn.Linear(hidden, MAX_LOOPS, bias=False)
        for gate in (self.expert_gate, self.depth_predictor):
            nn.init.normal_(gate.weight, std=0.02)
        self.temperature = TAU[0]

    def ffn(self, normed: torch.Tensor, number: int | None = None) -> torch.Tensor:
        """The whole FFN of normed states `[..., d]`, or one slice of it: neurons `number f/8` to `(number + 1) f/8`."""
        width = len(self.gate_proj) // SLICES
        mine = slice(None) if number is None else slice(number * width, (number + 1) * width)
        inner = self.activation(F.linear(normed, self.gate_proj[mine])) * F.linear(normed, self.up_proj[mine])
        return F.linear(inner, self.down_proj[:, mine])

    def deep(self, stream: torch.Tensor, norm: Forward, passes: int = MAX_LOOPS) -> list[torch.Tensor]:
        """`[T, d]` what 1, 2, … passes add to the stream `[T, d]`."""
        added, total = [], torch.zeros_like(stream)
        for _ in range(passes):
            total = total + self.ffn(norm(stream + total))
            added.append(total)
        return added

    def wide(self, stream: torch.Tensor, norm: Forward) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """`[T, d]` what the two best slices add, which these are `[T, 2]`, and their weights `[T, 2]`."""
        scores, chosen = self.expert_gate(stream).topk(ACTIVE, -1)
        weights, normed = scores.softmax(-1), norm(stream)
        added = torch.zeros_like(stream)
        for number in range(SLICES):
            tokens, place = (chosen == number).nonzero(as_tuple=True)
            if len(tokens):
                part = self.ffn(normed[tokens], number) * weights[tokens, place, None]
                added = added.index_add(0, tokens, part.to(added.dtype))
        return added, chosen, weights

    def trained(self, stream: torch.Tensor, norm: Forward) -> torch.Tensor:
        """What is added while training: all passes and the wide path for every token, the depth drawn by Gumbel softmax."""
        drawn = F.gumbel_softmax(self.depth_predictor(stream), tau=self.temperature, hard=True)
        loops = (drawn * torch.arange(1, MAX_LOOPS + 1, device=drawn.device)).sum(-1, keepdim=True)
        deep = (torch.stack(self.deep(stream, norm), -1) * drawn[:, None]).sum(-1)
        share = fusion(loops)
        return (1 - share) * deep + share * self.wide(stream, norm)[0]

    def loops(self, stream: torch.Tensor) -> torch.Tensor:
        """`[T]` the passes each token takes, 1 to 4."""
        return self.depth_predictor(stream).argmax(-1) + 1

    def served(self, stream: torch.Tensor, norm: Forward, loops: torch.Tensor, ragged: bool) -> tuple[torch.Tensor, Served]:
        """`[T, d]` what is added to each token of the stream, and what that took.

        If `ragged`, a token takes part in as many passes as it was given, `loops` `[T]`; else, as in the released code, all
        tokens take as many as the hardest one, and what was given is picked.
        """
        if ragged:
            added, passes = torch.zeros_like(stream), 0
            for number in range(MAX_LOOPS):
                going = (loops > number).nonzero().squeeze(-1)
                if not len(going):
                    break
                passes += len(going)
                added = added.index_add(0, going, self.ffn(norm((stream + added)[going])))
        else:
            most = int(loops.max())
            passes = most * len(stream)
            each = torch.stack(self.deep(stream, norm, most), 1)
            added = each[torch.arange(len(stream), device=stream.device), loops - 1]
        easy = (loops < MAX_LOOPS).nonzero().squeeze(-1)
        share = fusion(loops).to(stream.dtype)[:, None]
        chosen, weights = loops.new_full((len(stream), ACTIVE), -1), share.new_zeros(len(stream), ACTIVE)
        if len(easy):
            wide, slices, given = self.wide(stream[easy], norm)
            chosen[easy], weights[easy] = slices, given.to(weights.dtype)
            added = ((1 - share) * added).index_add(0, easy, share[easy] * wide)
        return added, Served(passes, len(easy), chosen, weights * share)

    def flops(self, passes: int, easy: int) -> int:
        """`6 d f` a pass, and a quarter of that for each token that is not at the most passes."""
        return 6 * self.gate_proj.numel() * (SLICES * passes + ACTIVE * easy) // SLICES

    def gate_flops(self, tokens: int) -> int:
        """Of the two gates: 12 products of d."""
        return 2 * tokens * (self.expert_gate.weight.numel() + self.depth_predictor.weight.numel())


class VersatileBlock(nn.Module):
    """The FFNs of all layers."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(VersatileLayer(layer.mlp) for layer in layers)

    def cool(self, share: float) -> None:
        """The temperature after a share of the training: it falls by the same factor at every step."""
        start, end = TAU
        for layer in self.layers:
            layer.temperature = start * (end / start) ** share

    def forwards(
        self, layers: list[nn.Module], call: Progress | None = None, ragged: bool = True
    ) -> Mapping[nn.Module, Forward]:
        """What runs in place of each layer's norm before the FFN, which tells the stream, and of its FFN."""
        return {
            part: forward
            for index, (layer, own) in enumerate(zip(layers, self.layers, strict=True))
            for part, forward in _in_place(index, layer, own, ragged, call).items()
        }


def _in_place(
    index: int, layer: nn.Module, own: VersatileLayer, ragged: bool, call: Progress | None
) -> dict[nn.Module, Forward]:
    seen = {}

    def norm(original: Forward, stream: torch.Tensor) -> torch.Tensor:
        seen.update(stream=stream, norm=original)
        return stream

    def mlp(_: Forward, stream: torch.Tensor) -> torch.Tensor:
        flat, normed = stream.flatten(0, -2), seen["norm"]
        if own.training:
            return own.trained(flat, normed).view(stream.shape)
        loops = own.loops(flat)
        added, served = own.served(flat, normed, loops, ragged)
        if call is not None:
            _tell(call, index, own, served, loops)
        return added.view(stream.shape)

    return {layer.post_attention_layernorm: norm, layer.mlp: mlp}


def _tell(call: Progress, index: int, own: VersatileLayer, served: Served, loops: torch.Tensor) -> None:
    """Writes what was computed, and the choices: slices 0 to 7, then passes as 8 to 11; no slice where none served."""
    tokens, size = len(loops), own.gate_proj.element_size()
    hidden = own.gate_proj.shape[1]
    weights = 3 * own.gate_proj.numel() * size
    # Every pass and every slice takes a state in and gives one out; the weights are read once, as every path shares them.
    moved = 2 * hidden * size * (served.passes + ACTIVE * served.easy)
    flops = own.flops(served.passes, served.easy)
    call.work(index, "mlp", changed=tokens, flops=flops, bytes=moved + weights, weight_bytes=weights)
    gates = (own.expert_gate.weight.numel() + own.depth_predictor.weight.numel()) * size
    read = hidden * tokens * size + gates
    call.work(index, "method", changed=tokens, flops=own.gate_flops(tokens), bytes=read, weight_bytes=gates)
    choices = SLICES + MAX_LOOPS
    slices = torch.where(served.slices < 0, choices, served.slices)
    chosen = torch.cat([slices, SLICES - 1 + loops[:, None]], 1)
    given = torch.cat([served.weights.float(), 1 - fusion(loops.float())[:, None]], 1)
    call.routed(index, choices, chosen, given)
