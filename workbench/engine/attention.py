"""The one attention function, registered with transformers under the name `workbench`.

It serves models whose cache is an engine cache: the keys it is handed are a cache layer that knows how to attend. No
mask function is registered under the name, so transformers builds no mask: the store knows what is padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers import AttentionInterface

NAME = "workbench"


def workbench_attention(module, query, key, value, attention_mask, **kwargs):
    """Attention over an engine cache layer, which `key` is."""
    return key.attend(module, query, **kwargs)


AttentionInterface.register(NAME, workbench_attention)


@contextmanager
def engine_attention(configs: list[Any]) -> Iterator[None]:
    """Lets a model attend through the engine inside the block, and puts back what it had.

    `configs` are the model's `attention_configs`.
    """
    previous = [config._attn_implementation for config in configs]
    try:
        for config in configs:
            config._attn_implementation_internal = NAME
        yield
    finally:
        for config, implementation in zip(configs, previous, strict=True):
            config._attn_implementation_internal = implementation
