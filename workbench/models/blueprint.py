"""A model built from its config alone, on torch's meta device: its code runs on shapes, and no weight is ever allocated."""

from __future__ import annotations

import copy

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel


def blueprint(config: PreTrainedConfig, **implementations: str) -> PreTrainedModel:
    """The causal LM a config describes, without weights. The config itself is left as it is.

    `implementations` are those of `from_config`, such as `attn_implementation="eager"`.
    """
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(config), **implementations).eval()
