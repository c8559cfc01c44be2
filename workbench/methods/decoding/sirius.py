"""Sirius: the model with sparse FFNs drafts, the whole model reads the draft, corrects it and rewrites its KV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from workbench.engine.call import Call
from workbench.engine.ffn import Ffn, down_modules, ffns
from workbench.engine.replacing import Forward
from workbench.errors import UserError
from workbench.methods.base import knob, register
from workbench.methods.decoding.base import DecodingMethod, account
from workbench.models.anatomy import mlp_modules
from workbench.trace.schema import DRAFT, VERIFY

if TYPE_CHECKING:
    from workbench.engine.session import Session
    from workbench.models.load import LM

FINE, COARSE = "fine", "coarse"

TEMPERATURE = 0.6
"""Of the whole model's softmax when it judges a drafted token, as in the paper's code."""

_STATISTICS = "sirius"


@register
@dataclass(frozen=True)
class Sirius(DecodingMethod):
    """Drafts with sparse FFNs and lets the whole model correct every so many tokens: it takes back from the first it doubts."""

    name: ClassVar[str] = "sirius"
    paper: ClassVar[str] = "Zhou et al. 2024, arXiv 2409.03856"
    deviations: ClassVar[tuple[str, ...]] = (
        "One draft at a time: the paper's beams of 4 to 8 drafts (`widthtree`), of which the longest accepted is kept, are not "
        "built.",
        "`keep` is the share of neurons kept in both ways; the paper's code says the share dropped for the fine one.",
        "A draft is cut where it ends the text or reaches the number of tokens asked for.",
        "Decoding is greedy, as in the paper: with a threshold below 1 the text is not the whole model's.",
    )

    sparsity: str = knob(
        FINE, choices=(FINE, COARSE), help="Neurons chosen anew for every token (CATS), or once by the prompt (GRIFFIN)."
    )
    keep: float = knob(0.5, low=0.01, high=1.0, help="Share of an FFN's neurons that drafts compute.")
    kernel_size: int = knob(16, low=1, high=256, unit="tokens", help="Tokens the whole model reads at once.")
    threshold: float = knob(
        0.1, low=0.0, high=2.0, help="Least probability a drafted token must have for the whole model; above 1 none has."
    )

    def check(self, lm: LM) -> None:
        """Raises UserError for a model whose FFNs are not all dense and of a known form."""
        if len(ffns(lm)) < lm.anatomy.num_layers:
            raise UserError(
                f"{self.name!r} drafts with sparse FFNs, and not every layer of {lm.name} has a dense one; choose a "
                "dense model such as tiny-dense."
            )

    def density(self, lm: LM) -> float:
        """Share of the model's parameters that a drafted token uses."""
        left = 0
        for ffn in ffns(lm).values():
            of_all = [ffn.up, ffn.down] if self.sparsity == FINE and ffn.gate is not None else [ffn.down]
            sparse = sum(matrix[0].numel() for matrix in of_all) if self.sparsity == FINE else ffn.flops // 2
            left += sparse * (ffn.neurons - self._count(ffn)) // ffn.neurons
        return 1 - left / lm.anatomy.num_parameters

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of the neurons kept by the prompt, which lie in matrices of their own."""
        if self.sparsity == FINE or self.keep == 1:
            return 0
        return sum(ffn.weight_bytes * self._count(ffn) // ffn.neurons for ffn in ffns(lm).values())

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """FFNs that are sparse in a draft, and what watches the neurons while a prompt is read."""
        if self.keep == 1:
            return {}
        modules, found = mlp_modules(lm.model), ffns(lm)
        if self.sparsity == FINE:
            return {modules[layer]: self._fine(call, layer, ffn) for layer, ffn in found.items()}
        forwards = {modules[layer]: self._coarse(call, layer, ffn) for layer, ffn in found.items()}
        return forwards | {module: _watching(call, layer) for layer, module in down_modules(lm).items()}

    def find(
        self, session: Session, room: int, ends: frozenset[int], forced: Sequence[int] | None
    ) -> tuple[list[int], list[torch.Tensor]]:
        """One round: the whole model's next token, a draft that follows it, and as much of that as the whole model accepts."""
        taken = [session.logits]
        tokens = [int(taken[0].argmax()) if forced is None else forced[0]]
        while len(tokens) < min(self.kernel_size, room) and tokens[-1] not in ends:
            taken.append(session.attempt(tokens[-1:], DRAFT))
            tokens.append(int(taken[-1].argmax()) if forced is None else forced[len(tokens)])
        drafted = len(tokens) - 1
        session.take_back(drafted)
        after = session.attempt(tokens, VERIFY)
        likely = (after[:-1] / TEMPERATURE).softmax(-1).gather(1, torch.tensor(tokens[1:], device=after.device)[:, None])
        refused = (likely[:, 0] < self.threshold).nonzero()[:, 0].tolist()
        count = 1 + (refused[0] if refused else drafted)
        session.settle(tokens[:count], after[:count])
        account(session, tokens=count, by_other=count - 1, drafted=drafted, passes=1)
        return tokens[:count], taken[:count]

    def settled(self, session: Session) -> None:
        """Writes accepted tokens a pass, and the density that comes of it."""
        counts = account(session)
        aal, density = counts["tokens"] / counts["passes"], self.density(session.lm)
        effective = ((self.kernel_size - 1) * density + 1) / aal
        figures = {"aal": aal, "density": density, "effective_density": effective}
        session.call.writer.update_meta(decoding={**counts, "figures": figures})

    def _count(self, ffn: Ffn) -> int:
        return max(1, int(ffn.neurons * self.keep))

    def _fine(self, call: Call, layer: int, ffn: Ffn) -> Forward:
        """The neurons with the largest activation of the token at hand."""
        count = self._count(ffn)

        def forward(original: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if call.phase != DRAFT:
                return original(hidden, *args, **kwargs)
            token = hidden.flatten(0, -2)
            activated = ffn.activated(token)
            kept = activated[0].abs().topk(count).indices
            inner = activated[:, kept]
            whole = ffn.gate if ffn.gate is not None else ffn.up
            parts = [ffn.down[0][:, kept]]
            if ffn.gate is not None:
                up, bias = ffn.up
                parts.append(up[kept])
                inner = inner * F.linear(token, parts[-1], None if bias is None else bias[kept])
            _say(call, layer, [whole[0], *parts])
            return F.linear(inner, parts[0], ffn.down[1]).view(hidden.shape)

        return forward

    def _coarse(self, call: Call, layer: int, ffn: Ffn) -> Forward:
        """The neurons with the largest share of the prompt's tokens, in matrices of their own."""
        cut: list[tuple[torch.Tensor, Ffn]] = []

        def forward(original: Any, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if call.phase != DRAFT:
                return original(hidden, *args, **kwargs)
            seen = call.memory.get(_STATISTICS, {}).get(layer)
            if seen is None:
                raise UserError(
                    f"{self.name!r} with sparsity={COARSE} chooses neurons while the prompt is read; start a session with "
                    f"it, or take sparsity={FINE}."
                )
            if not cut or cut[0][0] is not seen:
                cut[:] = [(seen, ffn.only(seen.topk(self._count(ffn)).indices.sort().values))]
            part = cut[0][1]
            _say(call, layer, part.matrices)
            return part(hidden)

        return forward


def _watching(call: Call, layer: int) -> Forward:
    """Sums, over the tokens of prompts and further turns, the squares of what goes into `down`, each token's made a unit."""

    def forward(original: Any, inner: torch.Tensor) -> torch.Tensor:
        if call.phase in ("prefill", "append"):
            tokens = inner.flatten(0, -2).float()
            shares = F.normalize(tokens, dim=-1).square().sum(0)
            known = call.memory.get(_STATISTICS, {})
            call.memory[_STATISTICS] = {**known, layer: shares + known[layer] if layer in known else shares}
        return original(inner)

    return forward


def _say(call: Call, layer: int, matrices: Sequence[torch.Tensor]) -> None:
    """What one token's products with these matrices cost."""
    elements = sum(matrix.numel() for matrix in matrices)
    size = matrices[0].element_size()
    moved = size * (elements + sum(sum(matrix.shape) for matrix in matrices))
    call.work(layer, "mlp", changed=1, flops=2 * elements, bytes=moved, weight_bytes=size * elements)
