"""Gates of kv heads, trained: how much of a head's attention must reach back over everything.

In a two-way forward each kv head gives `a * full + (1 - a) * streaming`, where streaming attention sees the first and the
most recent tokens alone. Only the gates `a` are trained: the final hidden states where a text repeats a passage shall stay
those of the dense model, and as many gates as can shall close. DuoAttention, Xiao et al. 2024, arXiv 2410.10819, and its code.

Shapes: B batch (one text), Hq query heads, H kv heads, T tokens, D head size, L layers without a sliding window.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers.cache_utils import Cache

from workbench.engine.attention import engine_attention
from workbench.engine.cache import EngineLayer, acting_layers
from workbench.engine.call import Call
from workbench.engine.check import check_engine
from workbench.errors import UserError
from workbench.models.anatomy import accepts_logits_to_keep
from workbench.probes.attention import attention_configs
from workbench.probes.unobserved import unobserved
from workbench.trace.anatomy import Anatomy
from workbench.trace.store import TraceWriter

if TYPE_CHECKING:
    from workbench.engine.calibration import Document
    from workbench.models.load import LM

SINKS, RECENT = 4, 32
"""What streaming attention sees while gates are trained: 7% of a text of 512 tokens, as 384 are of the paper's longer ones."""

PENALTY = 0.05
"""Weight of the sum of the gates in the loss, as in the paper."""

PASSES, LEARNING_RATE = 12, 0.05
"""How often each text is trained on, and the rate between a slow start and a slow end; the paper takes 2,000 steps at 0.02."""


class GatedLayer(EngineLayer):
    """One layer of one forward call over a whole text: it mixes two ways of attending by a gate for each kv head."""

    def __init__(self, index: int, anatomy: Anatomy, gates: torch.Tensor | None, sinks: int, recent: int):
        super().__init__(index, anatomy, None, Call(TraceWriter({})))
        self.gates = gates
        """`[H]`, or None for full attention."""
        self._sinks, self._recent = sinks, recent

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args, **kwargs) -> tuple[GatedLayer, None]:
        """Takes the text's keys and values `[B, H, T, D]`, with what led to them."""
        self._seen = key_states.shape[2]
        self._keys_values = key_states, value_states
        return self, None

    def attend(
        self,
        module: nn.Module,
        query: torch.Tensor,
        scaling: float | None = None,
        softcap: float | None = None,
        s_aux: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attention output `[B, T, Hq, D]` of the queries `[B, Hq, T, D]`, through which gradients pass."""
        keys, values = (states.repeat_interleave(self.attention.group, 1) for states in self._keys_values)
        scores = (query @ keys.transpose(-1, -2)).float() * (query.shape[-1] ** -0.5 if scaling is None else scaling)
        if softcap is not None:
            scores = softcap * (scores / softcap).tanh()
        asked = torch.arange(scores.shape[-1], device=scores.device)
        behind = asked[:, None] - asked
        visible = (behind >= 0) & (behind < (self.attention.window or len(asked)))
        out = _attended(scores, visible, values, s_aux)
        if self.gates is not None:
            near = (behind < self._recent) | (asked < self._sinks)
            streaming = _attended(scores, visible & near, values, s_aux)
            gates = self.gates.repeat_interleave(self.attention.group)[:, None, None].to(out.dtype)
            out = gates * out + (1 - gates) * streaming
        return out.transpose(1, 2), None


def _attended(scores: torch.Tensor, visible: torch.Tensor, values: torch.Tensor, sinks: torch.Tensor | None) -> torch.Tensor:
    """`[B, Hq, T, D]` the values, weighted by a softmax over the visible scores and a learned sink, if there is one."""
    scores = scores.masked_fill(~visible, torch.finfo(scores.dtype).min)
    if sinks is None:
        return scores.softmax(-1).to(values.dtype) @ values
    extra = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:-1], 1)
    return torch.cat([scores, extra], -1).softmax(-1)[..., :-1].to(values.dtype) @ values


def hidden_states(lm: LM, document: Document, gates: torch.Tensor, sinks: int = SINKS, recent: int = RECENT) -> torch.Tensor:
    """`[A, hidden]` float32 final hidden states at the A tokens from which a needle is predicted, under gates `[L, H]`."""
    by_layer = dict(zip(acting_layers(lm.anatomy), gates, strict=True))
    layers = [GatedLayer(index, lm.anatomy, by_layer.get(index), sinks, recent) for index in range(lm.anatomy.num_layers)]
    asking = sorted({position for needle in document.needles for position in needle.asking})
    taken = []
    head = lm.model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, args: taken.append(args[0]))
    ids = torch.tensor([document.tokens], device=lm.device)
    positions = torch.arange(ids.shape[1], device=lm.device)[None]
    few = {"logits_to_keep": ids.shape[1] - asking[0]} if accepts_logits_to_keep(lm.model) else {}
    try:
        with unobserved(), engine_attention(attention_configs(lm.model)):
            lm.model(input_ids=ids, position_ids=positions, past_key_values=Cache(layers=layers), use_cache=True, **few)
    finally:
        hook.remove()
    (states,) = taken
    first = ids.shape[1] - states.shape[1]
    return states[0, [position - first for position in asking]].float()


def loss(states: torch.Tensor, dense: torch.Tensor, gates: torch.Tensor) -> torch.Tensor:
    """Mean square distance of hidden states `[A, hidden]` from the dense ones, and the penalty on open gates."""
    return (states - dense).square().mean() + PENALTY * gates.abs().sum()


def train(lm: LM, documents: Sequence[Document], on_step: Callable[[int, int], None] | None = None) -> torch.Tensor:
    """Trains gates `[L, H]` in [0, 1], from all open, a text at a time; the model's weights get no gradient.

    `on_step` is called with steps done and steps in all. Raises UserError if no text is longer than what streaming sees and
    repeats a passage, and for a model whose attention the engine does not reproduce or whose layers differ in kv heads.
    """
    texts = [document for document in documents if document.needles and len(document.tokens) > SINKS + RECENT]
    if not texts:
        raise UserError(
            f"Gates are trained on texts of more than {SINKS + RECENT} tokens that repeat a passage; give documents with "
            "needles, or leave documents out."
        )
    check_engine(lm.model, lm.anatomy)
    counts = [lm.anatomy.layers[index].attention.num_kv_heads for index in acting_layers(lm.anatomy)]
    if len(set(counts)) > 1:
        raise UserError(
            f"The layers of {lm.name} have {sorted(set(counts))} kv heads; gates are trained where all have as many."
        )
    gates = torch.ones(len(counts), counts[0], device=lm.device)
    with torch.no_grad():
        dense = [hidden_states(lm, text, gates) for text in texts]
    gates.requires_grad_(True)
    optimizer = torch.optim.AdamW([gates], weight_decay=0.0)
    steps = PASSES * len(texts)
    for done in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min(1.0, max(5 * min(done + 1, steps - done) / steps, 0.1))
        step(lm, texts[done % len(texts)], dense[done % len(texts)], gates, optimizer)
        if on_step is not None:
            on_step(done + 1, steps)
    return gates.detach()


def step(lm: LM, text: Document, dense: torch.Tensor, gates: torch.Tensor, optimizer: torch.optim.Optimizer) -> float:
    """One step on a text. Returns the loss before it."""
    with torch.enable_grad():
        before = loss(hidden_states(lm, text, gates), dense, gates)
        (gates.grad,) = torch.autograd.grad(before, [gates])
    optimizer.step()
    with torch.no_grad():
        gates.clamp_(0, 1)
    return before.item()
