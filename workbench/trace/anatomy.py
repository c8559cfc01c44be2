"""What a model is made of, as plain numbers.

An `Anatomy` stands in every trace, and all FLOPs and bytes are computed from it without the model. Sizes are
elements, not bytes, unless a name says so.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Linear:
    """One matrix product a token goes through: `in_features x out_features`, with or without a bias."""

    component: str
    in_features: int
    out_features: int
    bias: bool = False
    per_key: bool = False
    """Whether it is computed for every key that is read, not for every new token (MLA expanding its cached latents)."""


@dataclass(frozen=True)
class Attention:
    """Self-attention of one layer. `window` counts the tokens a query sees, itself included; None is all of them.

    `latent_dim` is what multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) caches a token in place of K and V.
    """

    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    value_dim: int
    window: int | None = None
    latent_dim: int | None = None

    @property
    def cached_elements(self) -> int:
        """Elements the cache holds for one token."""
        return self.latent_dim or self.num_kv_heads * (self.head_dim + self.value_dim)

    @property
    def group(self) -> int:
        """Query heads that share one kv head."""
        return self.num_q_heads // self.num_kv_heads


@dataclass(frozen=True)
class Experts:
    """The routed experts of one layer. `linears` is what one token goes through in one expert."""

    num_experts: int
    top_k: int
    linears: tuple[Linear, ...]


@dataclass(frozen=True)
class Layer:
    """One decoder layer. `linears` holds every dense matrix product in it, router included."""

    index: int
    attention: Attention
    linears: tuple[Linear, ...]
    norms: tuple[int, ...]
    experts: Experts | None = None


@dataclass(frozen=True)
class Anatomy:
    """A causal language model as numbers."""

    class_name: str
    model_type: str
    dtype: str
    element_bytes: int
    hidden_size: int
    vocab_size: int
    max_positions: int | None
    num_parameters: int
    layers: tuple[Layer, ...]
    final_norms: tuple[int, ...]
    lm_head: Linear
    activation: str | None = None
    """The MLP's activation, as the config names it."""

    @property
    def num_layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layers)

    @property
    def kv_bytes_per_token(self) -> int:
        """K and V of one token over all layers, in bytes."""
        return sum(layer.attention.cached_elements for layer in self.layers) * self.element_bytes

    def to_dict(self) -> dict[str, Any]:
        """A JSON-ready copy."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Anatomy:
        """The anatomy `to_dict` wrote."""
        return cls(
            **{
                **data,
                "layers": tuple(_layer_from_dict(layer) for layer in data["layers"]),
                "final_norms": tuple(data["final_norms"]),
                "lm_head": Linear(**data["lm_head"]),
            }
        )


def _layer_from_dict(data: dict[str, Any]) -> Layer:
    experts = data["experts"]
    return Layer(
        index=data["index"],
        attention=Attention(**data["attention"]),
        linears=tuple(Linear(**linear) for linear in data["linears"]),
        norms=tuple(data["norms"]),
        experts=None
        if experts is None
        else Experts(experts["num_experts"], experts["top_k"], tuple(Linear(**linear) for linear in experts["linears"])),
    )
