"""Triton where there is one. Off Linux, and without a GPU, the kernels' torch references run instead."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

try:
    import triton
    import triton.language as tl
except ImportError:  # no wheel for this platform
    triton: Any = None
    tl: Any = None


def jit(function: Any) -> Any:
    """`triton.jit`, or the bare function where Triton is missing and it will never be launched."""
    return function if triton is None else triton.jit(function)


def launches(*tensors: torch.Tensor) -> bool:
    """Whether a kernel runs on these tensors: all of them on CUDA, and Triton is there."""
    return triton is not None and all(tensor.is_cuda for tensor in tensors)


@dataclass(frozen=True)
class Tiles:
    """How a kernel cuts its work. Chosen so that nothing spills on sm_80 and sm_90, which a test holds."""

    rows: int
    """Queries or slots of a tile."""
    width: int
    """Head size, padded to a power of two of 16 or more."""
    chunk: int
    """Head elements multiplied at once; float32 goes through three tensor-core products and needs room."""
    num_warps: int
    num_stages: int = 2


def tiles_for(head_dim: int, element_bytes: int) -> Tiles:
    """The tiles for a head size and element size."""
    width = max(16, 1 << (head_dim - 1).bit_length())
    if element_bytes <= 2:
        return Tiles(rows=64, width=width, chunk=width, num_warps=4 if width <= 128 else 8)
    return Tiles(rows=32 if width <= 64 else 16, width=width, chunk=min(width, 32), num_warps=4)
