"""A budget that layers divide among themselves: each reports what it saw, and the policy makes shares of the reports.

Either once the last layer has reported, or anew after each (a cascade): then all layers so far get smaller shares and evict
again while the call goes on, so that the cache of a prompt never grows to its full size. A layer that decides after others
have run has no queries any more; its policy relies on what it put beside K and V when it observed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from workbench.engine.policy import AT_END, REPORT, CachePolicy

if TYPE_CHECKING:
    from workbench.engine.cache import EngineLayer
    from workbench.engine.call import Call


@dataclass(frozen=True)
class Report:
    """What a layer reports."""

    layer: EngineLayer
    tensor: torch.Tensor
    """`[B, ...]`."""
    held: list[int]
    """Tokens that its fullest kv head held at that moment, by row."""


def divides(call: Call, policy: CachePolicy, undecided: bool) -> bool:
    """Whether layers divide the budget in this call: at the end of a prompt or after a swap, unless every row fits."""
    if not undecided and call.phase != "prefill":
        return False
    return any(seen > policy.capacity(prompt) for seen, prompt in zip(call.seen, call.prompt_tokens, strict=True))


def divide(layer: EngineLayer, observed: dict[str, torch.Tensor]) -> None:
    """Takes a layer's report, and if it is time lets all layers that have reported decide on their shares."""
    call, policy = layer.call, layer.policy
    call.reports = [*call.reports, Report(layer, observed[REPORT], layer.store.held_by_row())]
    reports, num_layers = call.reports, len(call.capacity)
    is_last = len(reports) == num_layers
    if is_last:
        call.reports = []
    if policy.joint == AT_END and not is_last:
        return
    shares = resolve(
        policy, [each.tensor for each in reports], [each.held for each in reports], call.prompt_tokens, call.seen, num_layers
    )
    call.capacity = call.capacity | {each.layer.index: share for each, share in zip(reports, shares, strict=True)}
    call.divided_at = call.seen
    for each in reports:
        if each.layer.is_over():
            each.layer.decide()


def resolve(
    policy: CachePolicy,
    reports: Sequence[torch.Tensor],
    held: Sequence[Sequence[int]],
    prompt_tokens: Sequence[int],
    seen: Sequence[int],
    num_layers: int,
) -> list[list[int]]:
    """Shares by layer and row, of the layers that have reported. A row that fits as it is keeps what it has.

    `reports`, `held`, `prompt_tokens` and `num_layers` are as in `CachePolicy.share`; `seen` is by row.
    """
    shares = policy.share(reports, held, prompt_tokens, num_layers)
    mean = [policy.capacity(prompt) for prompt in prompt_tokens]
    return [
        [fair if tokens <= fair else share for share, tokens, fair in zip(rows, seen, mean, strict=True)] for rows in shares
    ]
