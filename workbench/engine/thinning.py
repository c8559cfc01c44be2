"""Thinning: after some layers of a prompt only some tokens go on, so that later layers really compute and hold less.

Decoder layers pass hidden states and per-token arguments (rotary cos and sin, position ids) as tensors `[B, Q, ...]`. Hooks
on the later layers gather the tokens that go on from each; tokens keep their positions. Whether a model can be thinned so is
found by trying: tokens that are gone must be the same as tokens that nobody may look at.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from workbench.engine.attention import engine_attention
from workbench.engine.cache import engine_cache
from workbench.engine.call import Call
from workbench.engine.check import tolerance
from workbench.engine.policy import THINNING, CachePolicy
from workbench.errors import UserError
from workbench.models.anatomy import decoder_layers
from workbench.probes.attention import attention_configs
from workbench.probes.unobserved import unobserved
from workbench.trace.anatomy import Anatomy
from workbench.trace.store import TraceWriter

_checked: weakref.WeakKeyDictionary[nn.Module, set[tuple[int, ...]]] = weakref.WeakKeyDictionary()
"""The layers after which, together, a model was seen to take thinning."""


class Thinner:
    """Between `attach` and `detach`, hands the layers after some only the tokens that the call says go on."""

    def __init__(self, model: nn.Module, after: tuple[int, ...], call: Call):
        self._layers = decoder_layers(model)[after[0] + 1 :]
        self._call = call
        self._handles: list[RemovableHandle] = []

    def attach(self) -> None:
        """Hooks the later layers."""
        for layer in self._layers:
            self._handles.append(layer.register_forward_pre_hook(self._gather, with_kwargs=True))

    def detach(self) -> None:
        """Removes every hook."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _gather(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        thinned = self._call.thinned
        if thinned is None:
            return None
        # What comes from the layer before has lost what earlier layers lost; what comes from outside is whole.
        by_length = {thinned.before.shape[1]: thinned.last, thinned.absent.shape[1]: thinned.index}

        def chosen(value: Any) -> Any:
            if not isinstance(value, torch.Tensor) or value.ndim < 2 or value.shape[1] not in by_length:
                return value
            which = by_length[value.shape[1]]
            whole = value.expand(len(which), *value.shape[1:])
            index = which.view(*which.shape, *(1,) * (value.ndim - 2))
            return whole.gather(1, index.expand(*which.shape, *value.shape[2:]))

        return tuple(tree_map(chosen, args)), tree_map(chosen, kwargs)


def thinners(model: nn.Module, policy: CachePolicy | None, call: Call) -> list[Thinner]:
    """What has to be attached to a model for a call under a policy: one thinner for a prompt, or none."""
    if policy is None or THINNING not in policy.needs or call.phase != "prefill":
        return []
    after = policy.thins_after(len(decoder_layers(model)))
    return [Thinner(model, after, call)] if after else []


def check_thinning(model: nn.Module, anatomy: Anatomy, policy: CachePolicy | None) -> None:
    """Tries what a thinning policy wants on a short prompt. Raises UserError for a model that cannot be thinned so."""
    after = policy.thins_after(anatomy.num_layers) if policy is not None and THINNING in policy.needs else ()
    if not after or after in _checked.get(model, ()):
        return
    slides = next((layer.index for layer in anatomy.layers[after[0] :] if layer.attention.window is not None), None)
    if slides is not None:
        why = f"layer {slides} sees a sliding window, which would reach further back over the tokens that are left"
        raise UserError(_refusal(model, after, why))
    try:
        gone = _last_logits(model, anatomy, after, _drop)
    except (TypeError, RuntimeError, KeyError, IndexError, AttributeError, ValueError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(_refusal(model, after, f"it failed with: {reason}")) from error
    hidden = _last_logits(model, anatomy, after, _hide)
    gap = (gone - hidden).abs().max() / hidden.abs().max()
    if not gap <= tolerance(model):
        raise UserError(_refusal(model, after, f"its logits are {gap:.1%} off from those with the same tokens hidden"))
    _checked.setdefault(model, set()).add(after)


def _drop(call: Call, passing: torch.Tensor) -> None:
    call.thin(passing)


def _hide(call: Call, passing: torch.Tensor) -> None:
    """The same tokens stay in the layers, but as padding, which nobody sees."""
    call.positions = call.positions.masked_fill(~passing, -1)
    call.has_padding = True


@torch.no_grad()
def _last_logits(
    model: nn.Module, anatomy: Anatomy, after: tuple[int, ...], leave_out: Callable[[Call, torch.Tensor], None]
) -> torch.Tensor:
    """Logits of the last of a few tokens `[V]`, when after each of some layers a few do not go on: of one, every third."""
    each = len(after) + 2
    length = 4 * each
    ids = torch.arange(2, 2 + length, device=model.device)[None] % anatomy.vocab_size
    positions = torch.arange(length, dtype=torch.int32, device=model.device)[None]
    call = Call(TraceWriter({}), positions=positions, seen=[length])
    cache = engine_cache(model, anatomy, None, call)

    def thin(number: int) -> None:
        leave_out(call, call.positions % each != number)

    with unobserved(), engine_attention(attention_configs(model)), _before(model, after, thin):
        thinner = Thinner(model, after, call)
        thinner.attach()
        try:
            out = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
        finally:
            thinner.detach()
    return out.logits[0, -1].float()


@contextmanager
def _before(model: nn.Module, after: tuple[int, ...], act: Callable[[int], None]) -> Iterator[None]:
    """Before the layer after each of some runs, acts with the number of it."""
    layers = decoder_layers(model)
    handles = [
        layers[index + 1].register_forward_pre_hook(lambda *_, number=number: act(number)) for number, index in enumerate(after)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _refusal(model: nn.Module, after: tuple[int, ...], why: str) -> str:
    layers = f"layer {after[0]}" if len(after) == 1 else f"layers {', '.join(map(str, after))}"
    return f"{type(model).__name__} cannot go on with some tokens only after {layers}: {why}; choose another method."
