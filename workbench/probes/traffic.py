"""What a model's eager operations move, found by running its blueprint on shapes while every operand is counted.

The blueprint has no weights and computes nothing, so this costs milliseconds, whatever the size of the model, and the model
itself is not touched. A call of a few sizes gives the polynomials of `workbench.trace.traffic`, which hold for all sizes as
long as no sliding window is shorter than the sizes tried.

Operands in and results out count whole, as the operation takes them: the table of an embedding too, of which it reads a few
rows, and an expanded tensor as large as it looks. Views move nothing. Experts loop over those that were hit; they are run
for real, on weights that take no memory, since their code looks at the choices.
"""

from __future__ import annotations

import functools
import itertools
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, DynamicCache, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from workbench.models.anatomy import (
    anatomy_of,
    attention_modules,
    component_modules,
    decoder_layers,
    expert_modules,
    unplaced_modules,
)
from workbench.models.blueprint import blueprint
from workbench.probes.attention import attention_configs
from workbench.trace.anatomy import Anatomy
from workbench.trace.traffic import TERMS, expert_terms, terms

_PRODUCTS = {"mm", "addmm", "bmm", "baddbmm"}
_PRODUCT_COMPONENTS = {"attention.qkv", "attention.out", "mlp", "router", "lm_head"}
_HEAD, _OUTSIDE = "head", "outside"
_numbers = itertools.count()
_known: weakref.WeakKeyDictionary[nn.Module, dict[str, Any]] = weakref.WeakKeyDictionary()

_SIZES = {
    "prefill": ((0, 3), (0, 4), (0, 6)),
    "decode": ((5, 1), (8, 1)),
    "append": ((4, 2), (4, 3), (6, 2), (6, 3)),
}
"""Past and new tokens of the calls that are tried."""
_LONGEST = 9
_EXPERT_TOKENS = (8, 12)
_FREE_TERMS = {"prefill": ("1", "t", "tn", "b", "bt", "btn"), "decode": ("1", "n", "b", "bn"), "append": TERMS}
"""The terms that can be told apart: in a prefill n = t, in a decode step t = 1."""


class OperandCounter(TorchDispatchMode):
    """Calls `on_bytes(name, bytes)` for each operation that moves data: its tensors in and its tensors out."""

    def __init__(self, on_bytes: Callable[[str, int], None]):
        super().__init__()
        self._on_bytes = on_bytes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        """Counts one operation."""
        out = func(*args, **(kwargs or {}))
        name, is_view = _nature(func)
        if not is_view:
            tensors = [leaf for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, torch.Tensor)]
            # A constant that is brought to the model's device is at home already where the model has weights.
            if len({tensor.device for tensor in tensors}) == 1:
                self._on_bytes(name, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        return out


@functools.cache
def _nature(func: Any) -> tuple[str, bool]:
    """Name of an operation, and whether it only looks at its operand in another way."""
    name = func.overloadpacket.__name__
    returned = [value.alias_info for value in func._schema.returns]
    looks = bool(returned) and all(alias is not None and not alias.is_write for alias in returned)
    return name, looks or name == "_unsafe_view"


def eager_traffic(model: PreTrainedModel, regimes: Iterable[str]) -> dict[str, Any]:
    """Polynomials of every scope and component for some kinds of call (`traffic.regime`), JSON-ready.

    `{"regimes": {regime: [[scope, component, coefficients]]}, "experts": {layer: coefficients}}`, with the layer's index as
    scope, `outside` for what lies around the layers and `head` for what follows the output head (its `t` are logits).
    `{"reason": …}` if the model's code cannot be run on shapes.
    """
    found = _known.setdefault(model, {"regimes": {}})
    missing = [name for name in regimes if name not in found["regimes"]]
    if missing and "reason" not in found:
        try:
            found |= _measure(model, found["regimes"], missing)
        except Exception as error:
            lines = str(error).strip().splitlines()
            found["reason"] = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return {"reason": found["reason"]} if "reason" in found else found


def _measure(model: PreTrainedModel, known: dict[str, Any], missing: list[str]) -> dict[str, Any]:
    anatomy = anatomy_of(model)
    shortest = min((layer.attention.window or _LONGEST + 1 for layer in anatomy.layers), default=0)
    if shortest <= _LONGEST:
        raise ValueError(f"a sliding window of {shortest} tokens is shorter than the calls tried")
    kinds = [_kind(block) for block in decoder_layers(model)]
    firsts = [kinds.index(kind) for kind in kinds]
    run = _ShapeRun(_shortened(model, anatomy, max(firsts) + 1))
    with run.attached():
        known |= {name: run.polynomials(name) for name in missing}
    return {"regimes": known, "experts": run.experts(), "same_as": firsts}


def _kind(block: nn.Module) -> list[tuple]:
    """What tells a layer from one that does the same: its modules, the shapes of their weights, and their plain settings."""
    kind: list[tuple] = []
    for name, module in block.named_modules():
        settings = {key: value for key, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
        settings.pop("layer_idx", None)
        kind.append((name, type(module), settings, [weight.shape for weight in module.parameters(recurse=False)]))
    return kind


def _shortened(model: PreTrainedModel, anatomy: Anatomy, num_layers: int) -> PreTrainedModel:
    """The blueprint with no more layers than it takes to see each kind, if the config can say so; else with all."""
    options = {"dtype": next(model.parameters()).dtype, "attn_implementation": "eager"}
    short = blueprint(model.config, num_layers, **options)
    return short if anatomy_of(short).layers == anatomy.layers[:num_layers] else blueprint(model.config, **options)


class _ShapeRun:
    """A blueprint whose calls are counted by scope and component."""

    def __init__(self, model: PreTrainedModel):
        if hasattr(model, "set_experts_implementation"):
            model.set_experts_implementation("eager")
        self.model = model
        self._anatomy = anatomy_of(model)
        self._experts = expert_modules(model)
        self._components = component_modules(model) | dict.fromkeys(unplaced_modules(model).values(), "unattributed")
        self._scopes: list[int | str] = [_OUTSIDE]
        self._inside: list[str] = []
        self._moved: Counter[tuple[int | str, str]] = Counter()

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Makes the blueprint say where it is; its experts, which need values, are left out."""
        for experts in self._experts.values():
            experts.forward = lambda hidden_states, *args, **kwargs: hidden_states
        for index, block in enumerate(decoder_layers(self.model)):
            self._mark(block, self._scopes, index)
        for module, component in self._components.items():
            self._mark(module, self._inside, component)
        self.model.get_output_embeddings().register_forward_pre_hook(lambda *_: self._scopes.append(_HEAD))
        for module in attention_modules(self.model):
            if not hasattr(sys.modules[type(module).__module__], "eager_attention_forward"):
                self._mark(module, self._inside, "attention.scores")
        self.model.config.get_text_config().pad_token_id = None  # models that know it look for padding among the ids
        name = f"counted_{next(_numbers)}"
        for config in attention_configs(self.model):
            config._attn_implementation_internal = name
        AttentionInterface._global_mapping[name] = self._attention
        AttentionMaskInterface._global_mapping[name] = AttentionMaskInterface._global_mapping["eager"]
        try:
            yield
        finally:
            AttentionInterface._global_mapping.pop(name)
            AttentionMaskInterface._global_mapping.pop(name)

    def polynomials(self, name: str) -> list[list[Any]]:
        """Rows of scope, component and coefficients for one kind of call."""
        phase, *options = name.split()
        batches = (2, 3) if "batched" in options else (1,)
        sizes = [(batch, *size) for batch in batches for size in _SIZES[phase]]
        runs = [self._run(*size, "masked" in options) for size in sizes]
        values = np.array([terms(batch, tokens, past + tokens) for batch, past, tokens in sizes])
        free = [term for term in _FREE_TERMS[phase] if "batched" in options or "b" not in term]
        rows = []
        for scope, component in dict.fromkeys(place for run in runs for place in run):
            chosen = [term for term in free if scope != _HEAD or "n" not in term]
            columns = [TERMS.index(term) for term in chosen]
            solved = _solve(values[:, columns], [run[scope, component] for run in runs])
            coefficients = [0.0] * len(TERMS)
            for column, coefficient in zip(columns, solved, strict=True):
                coefficients[column] = coefficient
            rows.append([scope, component, coefficients])
        return rows

    @torch.no_grad()
    def experts(self) -> dict[str, list[float]]:
        """Coefficients of `EXPERT_TERMS` for each layer that has experts, by its index."""
        return {str(layer): self._experts_of(layer, module) for layer, module in self._experts.items()}

    def _experts_of(self, layer: int, module: nn.Module) -> list[float]:
        experts = self._anatomy.layers[layer].experts
        for owner in module.modules():
            for name, weight in owner._parameters.items():
                if weight is not None:
                    owner._parameters[name] = nn.Parameter(torch.zeros(1, dtype=weight.dtype).expand(weight.shape), False)
        top_k, dtype = experts.top_k, self.model.dtype
        sizes, moved = [], []
        for tokens, hit in itertools.product(_EXPERT_TOKENS, dict.fromkeys((top_k, min(2 * top_k, experts.num_experts)))):
            hidden = torch.zeros(tokens, experts.linears[0].in_features, dtype=dtype)
            index = torch.arange(tokens * top_k).reshape(tokens, top_k) % hit
            weights = torch.ones(tokens, top_k, dtype=dtype)
            counted: list[int] = []
            with OperandCounter(lambda _, nbytes, counted=counted: counted.append(nbytes)):
                type(module).forward(module, hidden, index, weights)
            sizes.append(expert_terms(tokens, hit))
            moved.append(sum(counted))
        return _solve(np.array(sizes), moved)

    def _mark(self, module: nn.Module, stack: list, value: int | str) -> None:
        def leave(*_: Any) -> None:
            stack.pop()

        module.register_forward_pre_hook(lambda *_: stack.append(value))
        module.register_forward_hook(leave)

    def _attention(self, module, query, key, value, attention_mask, **kwargs):
        self._inside.append("attention.scores")
        result = sys.modules[type(module).__module__].eager_attention_forward(
            module, query, key, value, attention_mask, **kwargs
        )
        self._inside.pop()
        return result

    def _count(self, operation: str, nbytes: int) -> None:
        inside = self._inside[-1] if self._inside else "elementwise"
        product = operation in _PRODUCTS
        if inside in _PRODUCT_COMPONENTS and not product:
            inside = "elementwise"
        elif inside == "elementwise" and product:
            inside = "unattributed"
        self._moved[self._scopes[-1], inside] += nbytes

    @torch.no_grad()
    def _run(self, batch: int, past: int, tokens: int, masked: bool) -> Counter[tuple[int | str, str]]:
        cache = _MarkedCache(self._inside, config=self.model.config)
        if past:
            self._call(batch, past, 0, cache, masked, nullcontext())
        self._moved = Counter()
        self._call(batch, tokens, past, cache, masked, OperandCounter(self._count))
        return self._moved

    def _call(
        self, batch: int, tokens: int, past: int, cache: DynamicCache, masked: bool, counting: AbstractContextManager
    ) -> None:
        ids = torch.zeros(batch, tokens, dtype=torch.long, device="meta")
        mask = torch.ones(batch, past + tokens, dtype=torch.long, device="meta") if masked else None
        self._scopes[:] = [_OUTSIDE]
        with counting:
            self.model(ids, attention_mask=mask, past_key_values=cache, use_cache=True)


class _MarkedCache(DynamicCache):
    """A cache that says when it is at work."""

    def __init__(self, inside: list[str], **options: Any):
        super().__init__(**options)
        self._inside = inside

    def update(self, *args, **kwargs):
        """Stores new keys and values."""
        self._inside.append("cache")
        result = super().update(*args, **kwargs)
        self._inside.pop()
        return result


def _solve(values: np.ndarray, moved: list[int]) -> list[float]:
    """The coefficients by which `values` give `moved`. Raises ValueError if they are not what a sum of sizes gives."""
    solution = np.linalg.lstsq(values.astype(float), np.array(moved, dtype=float), rcond=None)[0]
    exact = np.rint(2 * solution) / 2
    if not np.array_equal(values @ exact, moved):
        raise ValueError("the bytes its operations move are no sum of products of the sizes of a call")
    return exact.tolist()
