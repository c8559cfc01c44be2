"""The models of the benchmarks: by name, or `random-8x512`, whose weights are random and whose speed is not.

`random-8x512` is a Llama of 8 layers, hidden size 512, 8 query and 2 kv heads of 64.
"""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import workbench as wb


def load(name: str, context: int) -> wb.LM:
    """A model by name, with room for twice `context` tokens if it is made here."""
    if name != "random-8x512":
        return wb.load(name)
    tokenizer = wb.load("tiny-dense").tokenizer
    sizes = dict(hidden_size=512, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2, intermediate_size=1408)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2 * context, eos_token_id=None, **sizes)
    return wb.load((LlamaForCausalLM(config), tokenizer))
