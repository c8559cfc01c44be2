"""How far a setup's predictions are from the dense run's, position by position along the same tokens."""

from __future__ import annotations

import torch
import torch.nn.functional as F


def kl_to_dense(dense: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """KL(dense || setup) of the next token at every position, nats. Both logits `[n, V]`; returns `[n]`."""
    reference, other = dense.log_softmax(-1), logits.log_softmax(-1)
    return (reference.exp() * (reference - other)).sum(-1).clamp(min=0)


def top1_agreement(dense: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Whether the likeliest token is the same, at every position, `[n]` float."""
    return (dense.argmax(-1) == logits.argmax(-1)).float()


def negative_log_likelihood(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Negative log-likelihood of the tokens `[n]` under logits `[n, V]`, nats."""
    return F.cross_entropy(logits, tokens, reduction="none")
