"""Whether the engine computes what a model computes, tried once a model before its first session.

The engine replaces a model's attention. A model whose attention does something the engine knows nothing of (a position
bias, say) would run and give wrong numbers; this refuses it instead.
"""

from __future__ import annotations

import weakref

import torch
from torch import nn

from workbench.engine.attention import engine_attention
from workbench.engine.cache import engine_cache
from workbench.engine.call import Call
from workbench.errors import UserError
from workbench.probes.attention import attention_configs
from workbench.probes.unobserved import unobserved
from workbench.trace.anatomy import Anatomy
from workbench.trace.store import TraceWriter

_LENGTH = 12
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-6}
_HALF_TOLERANCE = 5e-2

_checked: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@torch.no_grad()
def check_engine(model: nn.Module, anatomy: Anatomy) -> None:
    """Compares a short prompt and one decoded token with the model's own forward. Raises UserError if they differ."""
    if model in _checked:
        return
    ids = torch.arange(2, 2 + _LENGTH, device=model.device)[None] % anatomy.vocab_size
    call = Call(TraceWriter({}))
    cache = engine_cache(model, anatomy, None, call)
    given = []
    with unobserved():
        expected = model(input_ids=ids, use_cache=False).logits[0].float()
    try:
        with unobserved(), engine_attention(attention_configs(model)):
            for start, stop in ((0, _LENGTH - 1), (_LENGTH - 1, _LENGTH)):
                call.positions = torch.arange(start, stop, dtype=torch.int32, device=model.device)[None]
                call.seen = [stop]
                part = ids[:, start:stop]
                out = model(input_ids=part, position_ids=call.positions, past_key_values=cache, use_cache=True)
                given.append(out.logits[0].float())
    except (AttributeError, UserError) as error:
        raise UserError(_refusal(model, "its attention does not go through transformers' attention interface")) from error
    except (TypeError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[0].rstrip(".") if str(error) else type(error).__name__
        raise UserError(_refusal(model, f"it failed with: {reason}")) from error
    gap = (torch.cat(given) - expected).abs().max() / expected.abs().max()
    if not gap <= tolerance(model):
        raise UserError(_refusal(model, f"its logits differ from the model's own by {gap:.1%}"))
    _checked.add(model)


def tolerance(model: nn.Module) -> float:
    """How far logits may differ, as a share of the largest, where two ways to compute them are the same."""
    return _TOLERANCE.get(next(model.parameters()).dtype, _HALF_TOLERANCE)


def _refusal(model: nn.Module, why: str) -> str:
    name = type(model).__name__
    return (
        f"A session cannot run {name}: tried on {_LENGTH} tokens, {why}. Use wb.profile(model), which observes any attention."
    )
