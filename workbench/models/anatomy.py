"""Reads a model's anatomy from its modules and config, never from its name."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from workbench.errors import UserError
from workbench.trace.anatomy import Anatomy, Attention, Experts, Layer, Linear

_OUTPUTS = {"o_proj", "out_proj", "dense", "c_proj", "wo"}
"""What attention calls its output projection."""


def anatomy_of(model: nn.Module) -> Anatomy:
    """Reads the anatomy of a `transformers` causal LM. Raises UserError for what is not one."""
    name = type(model).__name__
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    blocks = decoder_layers(model)
    if head is None or not blocks:
        raise UserError(
            f"{name} is not a causal language model with an output head and layers that all attend; "
            "pass a model made by AutoModelForCausalLM."
        )
    crossing = next((part for block in blocks for part, _ in block.named_modules() if _is_cross_attention(part)), None)
    if model.config.is_encoder_decoder or crossing is not None:
        where = f" ({crossing} in its layers)" if crossing is not None else ""
        raise UserError(f"{name} attends to an encoder{where}, which is not measured; pass a decoder-only model.")
    config = model.config.get_text_config()
    weight = next(model.parameters())
    inside = {id(module) for block in blocks for module in block.modules()}
    configs = getattr(config, "per_layer_config", [config] * len(blocks))
    layers = tuple(_read_layer(index, block, configs[index]) for index, block in enumerate(blocks))
    return Anatomy(
        class_name=name,
        model_type=config.model_type,
        dtype=str(weight.dtype).removeprefix("torch."),
        element_bytes=weight.element_size(),
        hidden_size=config.hidden_size,
        vocab_size=config.vocab_size,
        max_positions=getattr(config, "max_position_embeddings", None),
        num_parameters=sum(parameter.numel() for parameter in model.parameters()),
        layers=layers,
        final_norms=tuple(m.weight.numel() for m in model.modules() if _is_norm(m) and id(m) not in inside),
        lm_head=_linear("lm_head", head),
        activation=_first(config, "hidden_activation", "hidden_act", "activation_function"),
    )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The decoder layers: the items of the longest module list whose items hold a self-attention."""
    text = model.get_decoder() if hasattr(model, "get_decoder") else model  # a vision tower may be the deeper stack
    return _deepest_stack(text) or _deepest_stack(model)


def _deepest_stack(model: nn.Module) -> list[nn.Module]:
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m)]
    stacks = [stack for stack in lists if all(_find_attention(block) is not None for block in stack)]
    return list(dict.fromkeys(max(stacks, key=len))) if stacks else []  # a block that is listed twice runs twice


def decoder(model: nn.Module) -> nn.Module:
    """The innermost model that holds the decoder layers and takes tokens: the causal LM without its head."""
    first = decoder_layers(model)[0]
    holders = [m for m in model.modules() if isinstance(m, PreTrainedModel) and any(part is first for part in m.modules())]
    return holders[-1]


def attention_modules(model: nn.Module) -> list[nn.Module]:
    """The self-attention module of every decoder layer, in order. Raises UserError if a layer has none."""
    found = [_find_attention(block) for block in decoder_layers(model)]
    return [module for module in found if module is not None]


def output_projections(model: nn.Module) -> list[nn.Module | None]:
    """The module after the heads of every decoder layer's attention, `[..., Hq x Dv]` to `[..., hidden]`; None if unknown."""
    found = [
        [part for name, part in module.named_modules() if name.rsplit(".", 1)[-1] in _OUTPUTS]
        for module in attention_modules(model)
    ]
    return [next(iter(parts), None) for parts in found]


def expert_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The module holding the stacked expert weights, by layer index."""
    found = {}
    for index, block in enumerate(decoder_layers(model)):
        experts = _find_experts(block)
        if experts is not None:
            found[index] = experts
    return found


def mlp_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The module that holds a layer's FFN and nothing else, by layer index; layers with experts or without one are left out."""
    return {index: module for index, block in enumerate(decoder_layers(model)) if (module := _find_mlp(block)) is not None}


def mlp_linears(model: nn.Module) -> dict[int, list[nn.Module]]:
    """The matrix products of the FFN of those layers, in the order they are defined."""
    blocks = decoder_layers(model)
    return {index: _mlp_products(blocks[index]) for index in mlp_modules(model)}


def router_modules(model: nn.Module) -> dict[int, nn.Module]:
    """The module whose weight `[E, hidden]` scores the experts, by layer index; layers where none is found are left out."""
    found = {index: _find_router(block) for index, block in enumerate(decoder_layers(model))}
    return {index: router for index, router in found.items() if router is not None}


def unseen_experts(model: nn.Module) -> dict[str, list[int]]:
    """What holds experts whose routing cannot be seen: the class, and the layers it is in.

    Either they are not told which are chosen, or they are a second set beside the one that `expert_modules` finds.
    """
    found: dict[str, list[int]] = {}
    for index, block in enumerate(decoder_layers(model)):
        seen = _find_experts(block)
        asked = _holds_experts if seen is None else lambda module: _is_told_its_experts(module) and _holds_experts(module)
        unseen = next((module for module in block.modules() if module is not seen and asked(module)), None)
        if unseen is not None:
            found.setdefault(type(unseen).__name__, []).append(index)
    return found


def component_modules(model: nn.Module) -> dict[nn.Module, str]:
    """The component of every module whose work has a name of its own: matrix products, norms, embedding and head."""
    found: dict[nn.Module, str] = {module: "norm" for module in model.modules() if _is_norm(module)}
    for block in decoder_layers(model):
        found |= {module: component for module, component, _ in _products(block)}
    return found | {model.get_input_embeddings(): "embedding", model.get_output_embeddings(): "lm_head"}


def unplaced_modules(model: nn.Module) -> dict[str, nn.Module]:
    """Parts of the model beside its layers and head that hold a weight matrix, such as a vision tower; the outermost."""
    return dict(_branches("", model, {model.get_output_embeddings(), *decoder_layers(model)}))


def _branches(name: str, module: nn.Module, trunk: set[nn.Module]) -> Iterator[tuple[str, nn.Module]]:
    parts = set(module.modules())
    if module in trunk or not any(map(_multiplies, parts)):
        return
    if parts & trunk or isinstance(module, nn.ModuleList | nn.ModuleDict):  # these two are never called themselves
        for child_name, child in module.named_children():
            yield from _branches(f"{name}.{child_name}".removeprefix("."), child, trunk)
    else:
        yield name, module


def accepts_logits_to_keep(model: nn.Module) -> bool:
    """Whether the model can leave out the logits of all but the last positions."""
    return "logits_to_keep" in inspect.signature(model.forward).parameters


def _find_attention(block: nn.Module) -> nn.Module | None:
    """The block's self-attention: the outermost module that is called one and holds matrix products."""
    for name, module in block.named_modules():
        called = "attention" in type(module).__name__.lower() or "attn" in name.rsplit(".", 1)[-1]
        if called and any(map(_is_linear, module.modules())):
            return module
    return None


def _is_cross_attention(name: str) -> bool:
    last = name.rsplit(".", 1)[-1].lower()
    return ("cross" in last and "att" in last) or last in {"encoder_attn", "encdecattention"}


def _multiplies(module: nn.Module) -> bool:
    """Whether a module holds a matrix of its own that is more than a table to look up."""
    matrix = any(parameter.ndim > 1 for parameter in module.parameters(recurse=False))
    return matrix and not isinstance(module, nn.Embedding)


def _find_experts(block: nn.Module) -> nn.Module | None:
    for module in block.modules():
        weight = getattr(module, "down_proj", None)
        if isinstance(weight, nn.Parameter) and weight.ndim == 3 and _is_told_its_experts(module):
            return module
    return None


def _find_router(block: nn.Module) -> nn.Module | None:
    """What scores the experts: a gate with a weight of its own or, failing that, a Linear with a row for each expert.

    Attention, and a wide MLP, may have as many features as there are experts: a gate goes before what has another name.
    """
    experts = _find_experts(block)
    if experts is None:
        return None
    attention_module = _find_attention(block)
    elsewhere = set(attention_module.modules()) | set(experts.modules())
    candidates = [
        (not _is_router(module), not _is_gate(name), place, module)
        for place, (name, module) in enumerate(block.named_modules())
        if module not in elsewhere and (_is_router(module) or _is_linear(module))
    ]
    rows = experts.down_proj.shape[0]
    return next((module for *_, module in sorted(candidates, key=lambda each: each[:3]) if len(module.weight) == rows), None)


def _is_gate(name: str) -> bool:
    """Whether a module is named as what chooses among experts, which the gate of a gated MLP (`gate_proj`) is not."""
    return any(part == "gate" or "router" in part for part in name.split("."))


def _holds_experts(module: nn.Module) -> bool:
    """Whether a module is a set of experts, by a stack of weight matrices of its own or by the name of its class."""
    stacked = any(parameter.ndim == 3 and len(parameter) > 1 for parameter in module.parameters(recurse=False))
    convolution = isinstance(module, nn.modules.conv._ConvNd)
    return (stacked and not convolution) or type(module).__name__.endswith(("MoE", "Moe"))


def _mlp_products(block: nn.Module) -> list[nn.Module]:
    return [module for module, component, _ in _products(block) if component == "mlp"]


def _find_mlp(block: nn.Module) -> nn.Module | None:
    """The innermost module with all of a dense layer's FFN, called with hidden states alone."""
    products = set(_mlp_products(block))
    if not products or _find_experts(block) is not None:
        return None
    holders = [module for module in block.modules() if products <= set(module.modules()) and _find_attention(module) is None]
    holders = [module for module in holders if not isinstance(module, nn.ModuleList) and module not in products]
    if not holders or any(component == "router" for _, component, _ in _products(block)):
        return None
    needed = [each for each in inspect.signature(holders[-1].forward).parameters.values() if each.default is each.empty]
    return holders[-1] if len(needed) == 1 else None


def _is_told_its_experts(module: nn.Module) -> bool:
    """Whether the module is called with hidden states, chosen experts and their weights."""
    return len(inspect.signature(module.forward).parameters) >= 3


def _read_layer(index: int, block: nn.Module, config: Any) -> Layer:
    attention_module = _find_attention(block)
    experts_module = _find_experts(block)
    return Layer(
        index=index,
        attention=_read_attention(attention_module, config, index),
        linears=tuple(_linear(component, module, per_key) for module, component, per_key in _products(block)),
        norms=tuple(module.weight.numel() for module in block.modules() if _is_norm(module)),
        experts=None if experts_module is None else _read_experts(experts_module, block, config),
    )


def _products(block: nn.Module) -> Iterator[tuple[nn.Module, str, bool]]:
    """Every dense matrix product of a layer: the module, its component, and whether it is computed for every key read."""
    attention_module, router = _find_attention(block), _find_router(block)
    inside_attention = {id(module) for module in attention_module.modules()}
    for name, module in block.named_modules():
        if module is router:
            yield module, "router", False
        elif _is_linear(module):
            component = _attention_component(name) if id(module) in inside_attention else "mlp"
            yield module, component, name.endswith(".kv_b_proj") and _expands_latents(attention_module)
        elif _is_router(module):
            yield module, "router", False


def _read_attention(module: nn.Module, config: Any, index: int) -> Attention:
    num_q_heads = _first(config, "num_attention_heads", "n_head", "n_heads")
    num_kv_heads = _first(config, "num_key_value_heads", "num_kv_heads") or num_q_heads
    if getattr(config, "new_decoder_architecture", True) is False and getattr(config, "multi_query", False):
        num_kv_heads = 1  # Falcon's first generation says so in two flags
    head_dim = _first(module, "qk_head_dim", "head_dim") or config.hidden_size // num_q_heads
    latent_dim = None
    if _expands_latents(module):
        num_kv_heads, latent_dim = num_q_heads, module.kv_lora_rank + module.qk_rope_head_dim
    value_dim = _first(module, "v_head_dim") or head_dim
    return Attention(num_q_heads, num_kv_heads, head_dim, value_dim, _window(module, config, index), latent_dim)


def _expands_latents(module: nn.Module) -> bool:
    """Whether an attention caches latents and expands all of them at every call, as MLA does in transformers."""
    return hasattr(module, "kv_lora_rank") and hasattr(module, "expand_kv")


def _first(source: Any, *names: str) -> Any:
    """The first of several attributes that is there and set."""
    return next((value for name in names if (value := getattr(source, name, None))), None)


def _window(module: nn.Module, config: Any, index: int) -> int | None:
    """The sliding window of a layer. Only layers the config calls sliding have one, where it tells them apart."""
    kinds = getattr(config, "layer_types", None)
    if kinds is not None:
        return getattr(config, "sliding_window", None) if kinds[index] == "sliding_attention" else None
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    return getattr(config, "sliding_window", None)


def _read_experts(module: nn.Module, block: nn.Module, config: Any) -> Experts:
    hidden = config.hidden_size
    num_experts, rows, columns = module.down_proj.shape
    inner = columns if rows == hidden else rows
    names = ("num_experts_per_tok", "top_k", "moe_topk", "moe_k")
    top_k = _first(config, *names)
    if top_k is None:
        raise UserError(f"Cannot find how many experts {type(block).__name__} uses per token (looked for {', '.join(names)}).")
    up = getattr(module, "gate_up_proj", None)
    up_features = 2 * inner if up is not None else inner
    return Experts(num_experts, top_k, (Linear("experts", hidden, up_features), Linear("experts", inner, hidden)))


def _attention_component(name: str) -> str:
    return "attention.out" if _OUTPUTS & set(name.split(".")) else "attention.qkv"  # an adapter's matrices lie deeper


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _is_router(module: nn.Module) -> bool:
    """A gate that holds its own [experts, hidden] weight instead of being a Linear."""
    weight = getattr(module, "weight", None)
    name = type(module).__name__.lower()
    return isinstance(weight, torch.Tensor) and weight.ndim == 2 and ("router" in name or "gate" in name)


def _is_norm(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return "norm" in type(module).__name__.lower() and isinstance(weight, torch.Tensor) and weight.ndim == 1


def _linear(component: str, module: nn.Module, per_key: bool = False) -> Linear:
    if isinstance(module, nn.Linear):
        rows, columns = module.out_features, module.in_features  # a quantised weight is packed into another shape
    else:
        columns, rows = module.weight.shape
    return Linear(component, columns, rows, getattr(module, "bias", None) is not None, per_key)
