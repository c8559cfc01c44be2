"""Forwards of some modules replaced for the length of a session's call: how a routing method changes what is computed.

A forward is replaced on the module itself, not on its class, and what stood there before is put back, so that other sessions
and plain `generate()` never meet it. Hooks keep working: they see what goes into the module and what comes out.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

from workbench.engine.call import Call, Number, Work
from workbench.errors import UserError
from workbench.probes.moe import Choice
from workbench.probes.unobserved import unobserved
from workbench.trace.anatomy import Anatomy
from workbench.trace.store import TraceWriter

if TYPE_CHECKING:
    from workbench.models.load import LM

Forward = Callable[..., Any]
"""Called as `forward(original, *args, **kwargs)` in a module's place; `original` is the forward it stands for."""


class RoutingPolicy(Protocol):
    """A routing method as the engine uses it."""

    name: str

    def check(self, anatomy: Anatomy) -> None:
        """Raises UserError for a model the method cannot serve, before anything runs."""
        ...

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """What to run instead of which modules, in one session. What they did they write into `call`: `work`, `routed`.

        What a session has to remember from call to call goes into `call.memory`, which a branch copies.
        """
        ...

    def resident_bytes(self, lm: LM) -> int:
        """Bytes of the weights the method computes with, in place of the model's own expert or FFN weights."""
        ...


class Replacing(Protocol):
    """A policy of any slot that replaces forwards."""

    name: str

    def forwards(self, lm: LM, call: Call) -> Mapping[nn.Module, Forward]:
        """What to run instead of which modules."""
        ...


class Replacement:
    """Replaces forwards while attached."""

    def __init__(self, forwards: Mapping[nn.Module, Forward]):
        self._forwards = forwards
        self._before: list[tuple[nn.Module, Any]] = []

    def attach(self) -> None:
        """Puts the forwards in place."""
        for module, forward in self._forwards.items():
            self._before.append((module, vars(module).get("forward")))
            module.forward = partial(forward, module.forward)

    def detach(self) -> None:
        """Puts back what stood there."""
        while self._before:
            module, before = self._before.pop()
            del module.forward
            if before is not None:
                module.forward = before


@torch.no_grad()
def logits_under(lm: LM, policy: RoutingPolicy | None, tokens: Sequence[int]) -> torch.Tensor:
    """`[T, V]` float32 logits of one plain forward call over a text, under a routing policy; no profile sees it."""
    call = Call(TraceWriter({}))
    ids = torch.tensor([list(tokens)], device=lm.device)
    call.positions, call.seen = torch.arange(ids.shape[1], device=lm.device, dtype=torch.int32)[None], [ids.shape[1]]
    replaced = replacement(lm, [] if policy is None else [policy], call)
    replaced.attach()
    try:
        with unobserved():
            return lm.model(input_ids=ids, use_cache=False).logits[0].float()
    finally:
        replaced.detach()


def rerouted(chosen: list[Choice], given: Mapping[int, Choice]) -> list[Choice]:
    """What tokens were given in each layer: by the method where it said so, by the model elsewhere."""
    by_layer = {choice.layer: choice for choice in chosen}
    logits = {layer: choice.logits for layer, choice in by_layer.items()}
    changed = {layer: dataclasses.replace(choice, logits=logits.get(layer)) for layer, choice in given.items()}
    return [choice for _, choice in sorted({**by_layer, **changed}.items())]


def work_rows(steps: list[tuple[int, list[Work]]]) -> Iterator[tuple]:
    """Rows of the table of work for several steps, their numbers fetched in one go."""
    works = [(step, work) for step, done in steps for work in done]
    given = [number for _, work in works for number in _numbers(work) if isinstance(number, torch.Tensor)]
    fetched = iter(torch.stack(given).tolist() if given else ())
    for step, work in works:
        numbers = (next(fetched) if isinstance(number, torch.Tensor) else number for number in _numbers(work))
        yield step, work.layer, work.component, *numbers


def _numbers(work: Work) -> tuple[Number | None, ...]:
    return work.changed, work.flops, work.bytes, work.weight_bytes


def replacement(lm: LM, policies: Sequence[Replacing], call: Call) -> Replacement:
    """What has to be attached for a session's calls under some policies, which were checked.

    Raises UserError for a model one of them cannot serve, and for two that replace the same module.
    """
    forwards: dict[nn.Module, Forward] = {}
    for policy in policies:
        more = policy.forwards(lm, call)
        if forwards.keys() & more.keys():
            names = " and ".join(repr(each.name) for each in policies)
            raise UserError(f"{names} both replace what an FFN of {lm.name} computes; leave one of them out.")
        forwards |= more
    return Replacement(forwards)
