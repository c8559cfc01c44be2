"""A model built from its config alone, on torch's meta device: its code runs on shapes, and no weight is ever allocated."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def blueprint(config: PreTrainedConfig, num_layers: int | None = None, **options: Any) -> PreTrainedModel:
    """The causal LM a config describes, without weights. The config itself is left as it is.

    `num_layers` keeps only the first layers; `options` are those of `from_config`, such as `attn_implementation="eager"`.
    """
    config = copy.deepcopy(config)
    if num_layers is not None:
        text = config.get_text_config()
        kinds = getattr(text, "layer_types", None)
        text.num_hidden_layers = num_layers
        if kinds is not None:
            text.layer_types = kinds[:num_layers]
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, **options).eval()
