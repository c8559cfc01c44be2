"""The one attention function, registered with transformers under the name `workbench`.

It serves models whose cache is an engine cache: the keys it is handed are a cache layer that knows how to attend. No
mask function is registered under the name, so transformers builds no mask: the store knows what is padding.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface

from workbench.errors import UserError

NAME = "workbench"

_turn = threading.RLock()
"""A model's config says for all threads which attention it has, so calls through the engine take turns."""


def workbench_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention over an engine cache layer, which `key` is. Raises UserError where it is none."""
    if not hasattr(key, "attend"):
        raise UserError("This model is running a session in another thread; call it when the session's call is done.")
    return key.attend(module, query, **kwargs)


AttentionInterface.register(NAME, workbench_attention)


@contextmanager
def engine_attention(configs: list[Any]) -> Iterator[None]:
    """Lets a model attend through the engine inside the block, and puts back what it had.

    `configs` are the model's `attention_configs`.
    """
    with _turn:
        previous = [config._attn_implementation for config in configs]
        try:
            for config in configs:
                config._attn_implementation_internal = NAME
            yield
        finally:
            for config, implementation in zip(configs, previous, strict=True):
                config._attn_implementation_internal = implementation
