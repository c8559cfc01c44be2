"""Training of a block on texts, and what it reached: the model's own weights get no gradient.

Of a text with marked tokens the marked ones count, of one without all do; each kind has its mean loss, and the two are
added, as in the recipe of the built-in models (`workbench/models/train.py`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from workbench.models.blocks.attach import Forward, attached
from workbench.models.card import SEED, held_out_nats, recall_by_length
from workbench.models.rows import Rows

LEARNING_RATE, WARM_UP = 2e-3, 20
"""Peak rate of AdamW and steps up to it; a cosine takes it to a fiftieth."""
TOKENS = 2048
"""Tokens of a step."""
LENGTHS, SAMPLES = (128, 256, 512), 64
"""What recall is measured over, before and after: contexts, and texts of each."""


@dataclass(frozen=True)
class Text:
    """Token ids, and the places whose tokens count; none means that all do."""

    ids: tuple[int, ...]
    marked: tuple[int, ...] = ()


def batches(texts: Sequence[Text], tokens: int = TOKENS) -> list[list[Text]]:
    """Texts that follow each other, as many as have about so many tokens together."""
    made: list[list[Text]] = [[]]
    for text in texts:
        if made[-1] and sum(len(each.ids) for each in made[-1]) + len(text.ids) > tokens:
            made.append([])
        made[-1].append(text)
    return made


def loss(model: nn.Module, texts: Sequence[Text]) -> torch.Tensor:
    """Mean loss of the marked tokens, plus that of the texts that have none marked, nats a token."""
    longest = max(len(text.ids) for text in texts)
    # Filled up behind, where causal attention lets nothing see it.
    ids = torch.tensor([[*text.ids, *[0] * (longest - len(text.ids))] for text in texts], device=model.device)
    targets = [torch.full_like(ids, -100) for _ in range(2)]
    for row, text in enumerate(texts):
        places = torch.tensor(text.marked or range(1, len(text.ids)), device=ids.device)
        targets[bool(text.marked)][row, places] = ids[row, places]
    logits = model(ids, use_cache=False).logits[:, :-1].flatten(0, 1)
    kinds = [each[:, 1:].flatten() for each in targets if (each >= 0).any()]
    return torch.stack([F.cross_entropy(logits.float(), each) for each in kinds]).sum()


def train(
    model: nn.Module,
    block: nn.Module,
    forwards: Mapping[nn.Module, Forward],
    texts: Sequence[Text],
    steps: int,
    on_step: Callable[[int, int], None] | None = None,
    extra: Callable[[], torch.Tensor] | None = None,
    before: Callable[[float], None] | None = None,
) -> dict[str, Any]:
    """Trains the block's weights where its forwards take the place of parts of a model. Returns steps, seconds and losses.

    `on_step` is called with steps done and in all, `extra` gives a loss to be added after each forward call, and `before`
    is told before a step which share of the training is over.
    """
    block.train()
    weights = [parameter for parameter in block.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=LEARNING_RATE, weight_decay=0.0, betas=(0.9, 0.98))
    groups, losses, started = batches(texts), [], time.monotonic()
    with torch.enable_grad(), attached(forwards):
        for step in range(steps):
            for group in optimizer.param_groups:
                falling = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps))
                group["lr"] = LEARNING_RATE * min((step + 1) / WARM_UP, falling)
            if before is not None:
                before(step / steps)
            reached = loss(model, groups[step % len(groups)])
            whole = reached if extra is None else reached + extra()
            gradients = torch.autograd.grad(whole, weights, allow_unused=True)
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            losses.append(reached.item())
            if on_step is not None:
                on_step(step + 1, steps)
    block.eval()
    last = max(1, steps // 20)
    return {
        "steps": steps,
        "tokens_a_step": TOKENS,
        "seconds": round(time.monotonic() - started, 1),
        "first_loss": round(sum(losses[:last]) / last, 4),
        "last_loss": round(sum(losses[-last:]) / last, 4),
    }


def measured(model: nn.Module, rows: Rows, forwards: Mapping[nn.Module, Forward] | None = None) -> dict[str, Any]:
    """Recall by context length and next-token loss on held-out prose, as in the model's card, of a model with a block."""
    rows.rng.seed(SEED)
    with attached(forwards or {}):
        recalled = recall_by_length(model, rows, LENGTHS, SAMPLES)
        return {"recall_by_length": recalled, "held_out_nats": held_out_nats(model, rows)}
