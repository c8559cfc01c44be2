"""Small random models of many families, for tests of the workbench and of methods written for it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from workbench.engine.calibration import Document, Needle
from workbench.experiments.calibrate import calibrate, calibrations
from workbench.methods import parse_method
from workbench.models.load import LM

SMALL = dict(
    vocab_size=96,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    bos_token_id=0,
    eos_token_id=None,
    pad_token_id=1,
)

_SLIDING = dict(sliding_window=16)
_MIXED = dict(sliding_window=16, layer_types=["sliding_attention", "full_attention", "sliding_attention"])
_HEADS = dict(head_dim=8)
_GPT = dict(n_embd=32, n_layer=3, n_head=4)
_EXPERTS = dict(num_experts=6, num_experts_per_tok=2, moe_intermediate_size=24)
_MLA = dict(
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    q_lora_rank=16,
    kv_lora_rank=16,
    qk_nope_head_dim=8,
    qk_rope_head_dim=4,
    v_head_dim=6,
    first_k_dense_replace=1,
    num_key_value_heads=4,
)

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": _SLIDING,
    "qwen2": {},
    "qwen3": _HEADS,
    "gemma2": _HEADS | _SLIDING,
    "gemma3_text": _HEADS | _MIXED,
    "phi3": {},
    "gpt2": _GPT | {"n_positions": 512},
    "gpt_neox": {},
    "olmo2": {},
    "falcon": {"num_kv_heads": 2, "new_decoder_architecture": True},
    "starcoder2": {},
    "cohere2": _SLIDING,
    "smollm3": {"no_rope_layers": [1, 0, 1]},
    "gpt_oss": _HEADS | _MIXED | {"num_local_experts": 6, "num_experts_per_tok": 2},
    "mixtral": {"num_local_experts": 6, "sliding_window": None},
    "qwen2_moe": _EXPERTS | {"shared_expert_intermediate_size": 40, "decoder_sparse_step": 1},
    "qwen3_moe": _EXPERTS | _HEADS | {"decoder_sparse_step": 1},
    "olmoe": {"num_experts": 6, "num_experts_per_tok": 2},
    "deepseek_v3": _MLA | {"n_group": 2, "topk_group": 1},
    "deepseek_v2": _MLA,
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32},
    "bloom": {"n_head": 4, "n_layer": 3},
    "gptj": _GPT | {"rotary_dim": 4},
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 3},
    "granitemoe": {"num_local_experts": 6, "num_experts_per_tok": 2},
    "llama4_text": _HEADS | {"num_local_experts": 6, "intermediate_size_mlp": 48},
    "jetmoe": {"kv_channels": 8, "num_local_experts": 6},
}
"""What each family's config needs beyond `SMALL`, by `model_type`."""


def random_model(family: str, **changes: Any) -> PreTrainedModel:
    """A model of a family with random weights, the same ones at every call. `changes` go into the config."""
    torch.manual_seed(0)
    attention = {"attn_implementation": changes.pop("attn_implementation", None)}
    experts = changes.pop("experts_implementation", None)
    config = AutoConfig.for_model(family, **{**SMALL, **FAMILIES[family], **changes})
    model = AutoModelForCausalLM.from_config(config, **attention).eval()
    if experts is not None and hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation(experts)
    return model


def random_llama(num_kv_heads: int = 2, **changes: Any) -> PreTrainedModel:
    """A Llama with grouped query heads: 4 query heads, `num_kv_heads` kv heads of 8."""
    return random_model("llama", num_key_value_heads=num_kv_heads, **changes)


def random_qwen_moe(**changes: Any) -> PreTrainedModel:
    """A Qwen3-MoE: 6 experts, 2 a token, in every layer."""
    return random_model("qwen3_moe", **changes)


def random_gemma(**changes: Any) -> PreTrainedModel:
    """A Gemma 3: layers 0 and 2 slide over 16 tokens, one kv head."""
    return random_model("gemma3_text", **{"num_key_value_heads": 1, **changes})


RANDOM_MODELS: dict[str, Callable[..., PreTrainedModel]] = {
    "llama": random_llama,
    "qwen-moe": random_qwen_moe,
    "gemma": random_gemma,
}


def ids(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Random token ids `[batch, length]`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2, SMALL["vocab_size"], (batch, length), generator=generator)


def calibrate_all(lm: LM) -> LM:
    """A model whose every cache method that needs it is calibrated, on random tokens that repeat a passage; the same model."""
    prompts = [ids(40, seed=seed)[0].tolist() for seed in (1, 2)]
    needle = Needle(5, 9, (39, 40, 41, 42))
    documents = [Document((*prompt, *prompt[5:9]), len(prompt), (needle,)) for prompt in prompts]
    for name, found in calibrations(lm).items():
        if found is None and parse_method(name).slot == "cache":
            calibrate(lm, name, documents=documents)
    return lm


def footprint(model: nn.Module) -> dict[str, Any]:
    """All that observing or changing a model could leave behind, in it and in transformers, to be compared by `==`."""
    modules = dict(model.named_modules())
    configs = {name: module.config for name, module in modules.items() if hasattr(module, "config")}
    return {
        "weights": {name: tensor.numpy(force=True).tobytes() for name, tensor in model.state_dict().items()},
        "attributes": {name: _attributes(module) for name, module in modules.items()},
        "configs": {name: copy.deepcopy(vars(config)) for name, config in configs.items()},
        "training": {name: module.training for name, module in modules.items()},
        "attention functions": dict(AttentionInterface._global_mapping),
        "mask functions": dict(AttentionMaskInterface._global_mapping),
        "lookup": dict(vars(AttentionInterface)),
        "modes": len(_get_current_dispatch_mode_stack()),
    }


def _attributes(module: nn.Module) -> dict[str, Any]:
    """What a module object holds beside its weights: names, and the keys of every hook table."""
    return {name: list(value) if isinstance(value, dict) and "hooks" in name else None for name, value in vars(module).items()}
