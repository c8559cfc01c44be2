"""Trained lookahead tokens of a model: soft embeddings, and low-rank adapters (LoRA) that act on their rows alone.

LookaheadKV (ICLR 2026) runs them after a prompt, and keeps the prompt tokens they attend to. Trained by
`python -m workbench.experiments.lookahead`.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from workbench.errors import UserError
from workbench.folders import cache_directory
from workbench.models.anatomy import component_modules, decoder_layers
from workbench.models.load import BUILTIN

TOKENS, RANK, ALPHA = 32, 8, 32
"""Soft tokens, rank of the adapters, and what their product is scaled by, divided by the rank: as in the paper."""

_FILE = "lookahead.safetensors"
_ADAPTED = {"attention.qkv", "attention.out", "mlp"}
_SAMPLE = 64


class Lookahead(nn.Module):
    """Soft tokens `[n, hidden]` and, for every linear module of the decoder layers, `down` `[r, in]` and `up` `[out, r]`."""

    def __init__(self, model: nn.Module, tokens: int = TOKENS, rank: int = RANK, seed: int = 0):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        hidden = model.get_input_embeddings().weight.shape[1]
        self.soft = nn.Parameter(0.02 * torch.randn(tokens, hidden, generator=generator))
        self.modules_by_layer = adapted_modules(model)
        self.down, self.up = nn.ParameterDict(), nn.ParameterDict()
        for number, module in enumerate(module for layer in self.modules_by_layer for module in layer):
            down = torch.randn(rank, module.in_features, generator=generator) * module.in_features**-0.5
            self.down[str(number)] = nn.Parameter(down)
            self.up[str(number)] = nn.Parameter(torch.zeros(module.out_features, rank))
        self.scale = ALPHA / rank
        self.to(model.device)

    @property
    def count(self) -> int:
        """Soft tokens."""
        return len(self.soft)

    def embeddings(self, batch: int) -> torch.Tensor:
        """`[B, n, hidden]` the soft tokens for each row."""
        return self.soft.expand(batch, -1, -1)

    @contextmanager
    def attached(self) -> Iterator[None]:
        """Every token that goes through the model inside the block is a lookahead token, and is adapted."""
        pairs = zip((module for layer in self.modules_by_layer for module in layer), self.down, strict=True)
        handles = [module.register_forward_hook(self._adapter(name)) for module, name in pairs]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def flops(self, layer: int, tokens: int) -> int:
        """FLOPs the adapters of a layer add for so many tokens."""
        rank = self.down["0"].shape[0]
        return sum(2 * tokens * rank * (module.in_features + module.out_features) for module in self.modules_by_layer[layer])

    def adapter_bytes(self, layer: int) -> int:
        """Bytes of a layer's adapters, which each forward call reads."""
        rank, size = self.down["0"].shape[0], self.soft.element_size()
        return sum(rank * (module.in_features + module.out_features) * size for module in self.modules_by_layer[layer])

    def save(self, path: Path, model: nn.Module, about: dict) -> Path:
        """Writes the tokens and adapters in half precision, with what tells their model from others."""
        tensors = {name: tensor.detach().half().cpu().contiguous() for name, tensor in self.state_dict().items()}
        tensors["sample"] = _sample(model)
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path, metadata={"class": type(model).__name__, "about": json.dumps(about)})
        return path

    def _adapter(self, name: str):
        def adapt(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
            low = args[0] @ self.down[name].to(args[0].dtype).T
            return output + self.scale * (low @ self.up[name].to(output.dtype).T)

        return adapt


_found: weakref.WeakKeyDictionary[nn.Module, Lookahead] = weakref.WeakKeyDictionary()


def trained_lookahead(model: nn.Module, name: str) -> Lookahead:
    """What was trained for this model. Raises UserError, naming the command, if nothing was."""
    if model not in _found:
        files = [*BUILTIN.glob(f"*/{_FILE}"), *lookahead_folder().glob("*.safetensors")]
        tensors = next((found for path in files if (found := _fitting(path, model)) is not None), None)
        if tensors is None:
            raise UserError(
                f"No lookahead tokens were trained for {name}; run python -m workbench.experiments.lookahead {name}, or choose "
                "mode=pseudo or mode=oracle."
            )
        lookahead = Lookahead(model, *_shape(tensors)).requires_grad_(False)
        lookahead.load_state_dict({key: tensor for key, tensor in tensors.items() if key != "sample"})
        _found[model] = lookahead.to(next(model.parameters()).dtype)
    return _found[model]


def lookahead_folder() -> Path:
    """Where trained lookahead tokens of other than the built-in models are kept."""
    return cache_directory() / "lookahead"


def adapted_modules(model: nn.Module) -> list[list[nn.Linear]]:
    """The linear modules of each decoder layer that get an adapter: attention and MLP, not routers."""
    components = component_modules(model)
    return [
        [part for part in block.modules() if isinstance(part, nn.Linear) and components.get(part) in _ADAPTED]
        for block in decoder_layers(model)
    ]


def _fitting(path: Path, model: nn.Module) -> dict[str, torch.Tensor] | None:
    """A file's tensors, if they were trained for this model: of its class, with its weights but for rounding."""
    try:
        with safe_open(path, framework="pt") as opened:
            if (opened.metadata() or {}).get("class") != type(model).__name__:
                return None
            tensors = {name: opened.get_tensor(name) for name in list(opened.keys())}
    except (OSError, SafetensorError):
        return None
    ours = _sample(model)
    same = tensors["sample"].shape == ours.shape and torch.allclose(tensors["sample"], ours, rtol=2e-2, atol=1e-3)
    return tensors if same else None


def _sample(model: nn.Module) -> torch.Tensor:
    """A few weights of the first and the last adapted module, and its sizes: what tells a model from others."""
    modules = [module for layer in adapted_modules(model) for module in layer]
    weights = [module.weight.detach().flatten()[:_SAMPLE].float().cpu() for module in (modules[0], modules[-1])]
    return torch.cat([torch.tensor([float(len(modules)), *map(float, modules[0].weight.shape)]), *weights])


def _shape(tensors: dict[str, torch.Tensor]) -> tuple[int, int]:
    """Soft tokens and rank."""
    return len(tensors["soft"]), len(tensors["down.0"])
