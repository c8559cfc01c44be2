"""The Triton kernels without a GPU: their numbers through the interpreter, and compiled ahead of time for sm_80 and sm_90."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from workbench_kernels import column_mass as column_mass_module
from workbench_kernels import decode_attention as decode_module
from workbench_kernels import ragged_decode_attention as ragged_module
from workbench_kernels.jit import tiles_for

triton = pytest.importorskip("triton", reason="Triton has no wheel for this platform")


def test_numbers_through_the_interpreter():
    tests = Path(__file__).parent / "interpreted_kernels.py"
    command = [sys.executable, "-m", "pytest", str(tests), "-p", "no:cacheprovider"]
    done = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]


KERNELS = {
    "row_lse": (
        column_mass_module._row_lse_kernel,
        "query_ptr key_ptr *u8:occupied_ptr *fp32:lse_ptr",
        dict(HEAD_DIM=0, WIDTH=0, CHUNK=0, ROWS=0, COLUMNS=0, OCCUPIED=True),
    ),
    "column_mass": (
        column_mass_module._column_mass_kernel,
        "query_ptr key_ptr *u8:occupied_ptr *u8:asking_ptr *fp32:lse_ptr *fp32:mass_ptr",
        dict(HEAD_DIM=0, WIDTH=0, CHUNK=0, ROWS=0, COLUMNS=0, OCCUPIED=True, ASKING=True),
    ),
    "decode_attention": (
        decode_module._decode_attention_kernel,
        "query_ptr key_ptr value_ptr *u8:occupied_ptr *fp32:part_ptr *fp32:part_lse_ptr *fp32:scores_ptr",
        dict(GROUP=4, GROUP_ROWS=16, HEAD_DIM=0, VALUE_DIM=0, WIDTH=0, CHUNK=0, COLUMNS=0, STRETCH=512, OCCUPIED=True),
    ),
    "ragged_decode_attention": (
        ragged_module._ragged_decode_attention_kernel,
        "query_ptr key_ptr value_ptr *i64:starts_ptr *i64:ends_ptr *fp32:part_ptr *fp32:part_lse_ptr",
        dict(GROUP=4, GROUP_ROWS=16, HEAD_DIM=0, VALUE_DIM=0, WIDTH=0, CHUNK=0, COLUMNS=0, STRETCH=512),
    ),
}


@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("name", KERNELS)
def test_compiles_without_spills(name, head_dim, dtype, architecture, tmp_path):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    kernel, pointers, constants = KERNELS[name]
    tiles = tiles_for(head_dim, 4 if dtype == "fp32" else 2)
    tile = dict(
        HEAD_DIM=head_dim, VALUE_DIM=head_dim, WIDTH=tiles.width, CHUNK=tiles.chunk, ROWS=tiles.rows, COLUMNS=tiles.rows
    )
    constants = {**constants, **{key: value for key, value in tile.items() if key in constants}}
    signature = {}
    for pointer in pointers.split():
        kind, _, argument = pointer.rpartition(":")
        signature[argument] = kind or f"*{dtype}"
    for argument in kernel.arg_names:
        if argument not in signature and argument not in constants:
            signature[argument] = "fp32" if argument == "scaling" else "i32"

    signature = {argument: signature.get(argument, "constexpr") for argument in kernel.arg_names}
    options = dict(num_warps=tiles.num_warps, num_stages=tiles.num_stages)
    built = triton.compile(ASTSource(kernel, signature, constants), target=GPUTarget("cuda", architecture, 32), options=options)
    assert built.metadata.shared <= 96 * 1024
    assert local_bytes(built.asm["cubin"], tmp_path) == 0


def local_bytes(cubin: bytes, folder: Path) -> int:
    """Registers spilled to local memory, in bytes a thread, read from the compiled kernel."""
    path = folder / "kernel.cubin"
    path.write_bytes(cubin)
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    usage = subprocess.run([tool, "-res-usage", path], capture_output=True, text=True, check=True).stdout
    found = re.search(r"STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    return int(found[1]) + int(found[2])
