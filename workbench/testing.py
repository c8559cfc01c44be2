"""Small random models of several families, for tests of the workbench and of methods written for it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=1,
)


def random_llama(num_kv_heads: int = 2, **changes) -> LlamaForCausalLM:
    """A Llama with grouped query heads: 4 query heads, `num_kv_heads` kv heads of 8."""
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**SMALL, "num_key_value_heads": num_kv_heads, **changes})).eval()


def random_qwen_moe(**changes) -> Qwen3MoeForCausalLM:
    """A Qwen3-MoE: 6 experts, 2 a token, in every layer."""
    torch.manual_seed(0)
    experts = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24, decoder_sparse_step=1, head_dim=8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**SMALL, "num_key_value_heads": 2, **experts, **changes})).eval()


def random_gemma(**changes) -> Gemma3ForCausalLM:
    """A Gemma 3: layers 0 and 2 slide over 16 tokens, one kv head."""
    torch.manual_seed(0)
    sliding = dict(head_dim=8, sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
    return Gemma3ForCausalLM(Gemma3TextConfig(**{**SMALL, "num_key_value_heads": 1, **sliding, **changes})).eval()


RANDOM_MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": random_llama,
    "qwen-moe": random_qwen_moe,
    "gemma": random_gemma,
}


def ids(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, SMALL["vocab_size"], (batch, length), generator=generator)
