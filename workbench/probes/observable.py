"""Which models a profile refuses, since what it would record of them could not be right."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import nn
from torch._dynamo import OptimizedModule
from transformers import PreTrainedModel

from workbench.errors import UserError


def check_observable(model: nn.Module) -> None:
    """Raises UserError, with the next step, for a compiled model and for a module that only wraps a model."""
    if next(_compiled(model), None) is not None:
        raise UserError(
            f"{type(model).__name__} is compiled, and a compiled graph runs past the probes; profile the model without "
            "torch.compile (model._orig_mod, where torch.compile(model) made a copy)."
        )
    inner = next((part for part in model.modules() if isinstance(part, PreTrainedModel)), None)
    if inner is not None and inner is not model:
        raise UserError(
            f"{type(model).__name__} wraps a {type(inner).__name__}; profile that one, however the wrapper is called."
        )


def _compiled(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        forward = vars(module).get("forward")
        if isinstance(module, OptimizedModule) or module._compiled_call_impl or hasattr(forward, "_torchdynamo_orig_callable"):
            yield module


_COMPILING = (
    "This forward call is being compiled, and a compiled graph runs past the probes; pass disable_compile=True to "
    "generate(), or call the model without torch.compile."
)


@functools.partial(torch.compiler.disable, reason=_COMPILING)
def refuse_compiled() -> None:
    """Raises UserError out of a graph that is being compiled, as `generate` does with a static cache on a GPU."""
    raise UserError(_COMPILING)
