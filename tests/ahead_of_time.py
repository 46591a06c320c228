"""Compile kernels for Hopper without a GPU and report registers, spills and shared memory: one JSON line for each.

Run in a process of its own: Triton decides once, when it is first imported, whether it compiles or interprets.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

import parashoot as ps
from parashoot.tiling import HEAD_ROWS, Tiling
from parashoot.trace import trace_of
from parashoot.triton.runtime import REGISTERS, load
from parashoot.triton.sweep import source_of


@ps.cell
def waves(h: ps.State, x: ps.Input, y: ps.Input):
    return 0.5 * torch.sin(h + x) + 0.4 * torch.cos(h * y)


OWN = {"waves": waves}
FP32 = ("starts", "ends", "facts", "saved", "h", "end", "dh", "dp")
PTXAS = Path(triton.__file__).parent / "backends/nvidia/bin/ptxas"


def compile_kernel(cell: ps.Cell, direction: str, launch: str, dtype: str, tiling: Tiling, reset: bool = False) -> dict:
    """Registers, spilled bytes, shared memory and compile seconds of one kernel; dtype is "bf16", "fp16" or "fp32"."""
    found = trace_of(cell, torch.float32, torch.device("cpu"))
    kept = found.keeps_states(len(cell.states), torch.float32 if dtype == "fp32" else torch.bfloat16)
    kernel = load(source_of(found, cell, tiling.unroll, tiling.stages, False, reset, kept), direction)[
        launch == "correct"
    ]
    constants = {
        "BD": tiling.columns if launch == "shoot" or cell.width else min(tiling.columns, tiling.narrow),
        "NC": tiling.rows,
        "FAST": dtype == "bf16",
        "MASKED": False,
        "ALONE": bool(cell.width) and tiling.chunks == 1,
        "WIDE": False,
    }
    constants |= {"x_c": 1, "DIR": 1}
    if cell.width:
        constants |= {"WIDTH": cell.width, "NC": HEAD_ROWS, "ROWS": HEAD_ROWS}
    signature, values, attributes = {}, {}, {}
    for k, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[k,] = "constexpr", constants[name]
            continue
        if name.endswith("_ptr"):
            stem = name.removesuffix("_ptr")
            wide = stem in FP32 or re.fullmatch(r"p\d+", stem)
            signature[name] = "*u8" if stem == "reset" else "*fp32" if wide else f"*{dtype}"
        else:
            signature[name] = "fp32" if name in ("tol", "floor") else "i32"
        if name.endswith("_ptr") or name in ("C", "width") or re.fullmatch(r"(x|y|dx|dy)_[btgsh]", name):
            attributes[k,] = [["tt.divisibility", 16]]
    carries = 128 if len(cell.states) <= 2 else 64  # a warp
    correcting = tiling.warps if cell.width else max(1, min(8, tiling.rows * tiling.narrow // carries))
    options = {"num_warps": tiling.warps if launch == "shoot" else correcting}
    if launch == "shoot" and tiling.roomy:
        options["maxnreg"] = REGISTERS
    return {"cell": cell.name, "direction": direction, "launch": launch, "dtype": dtype} | made(
        kernel, signature, values, attributes, options
    )


def made(kernel: Any, signature: dict, values: dict, attributes: dict, options: dict) -> dict:
    """Registers, bytes spilled and on the stack, shared memory and compile seconds."""
    begun = time.perf_counter()
    compiled = triton.compile(ASTSource(kernel, signature, values, attributes), GPUTarget("cuda", 90, 32), options)
    seconds = time.perf_counter() - begun
    with tempfile.TemporaryDirectory() as folder:
        ptx = Path(folder, "kernel.ptx")
        ptx.write_text(compiled.asm["ptx"])
        command = [
            str(PTXAS),
            "-v",
            "--gpu-name=sm_90a",
            str(ptx),
            "-o",
            os.environ.get("CUBIN", os.path.join(folder, "kernel.cubin")),
        ]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    patterns = {"registers": r"Used (\d+) reg", "spilled": r"(\d+) bytes spill stores", "stack": r"(\d+) bytes stack"}
    found = {name: re.search(pattern, report) for name, pattern in patterns.items()}
    assert all(found.values()), report
    numbers = {name: int(match[1]) for name, match in found.items() if match}
    return {**numbers, "shared": compiled.metadata.shared, "seconds": round(seconds, 2)}


def compile_convolution(direction: str, taps: int, dtype: str, past: bool, reset: bool) -> dict:
    """The same of a kernel of the causal convolution with the tile it has."""
    from parashoot.triton import convolution

    kernel, tile = getattr(convolution, direction), convolution.tile_for(direction, taps)
    constants = {"K": taps, "PAST": past, "RESET": reset, "FAST": True}
    constants |= {"BLOCK": tile.block, "STEPS": tile.steps, "GROUP": tile.group}
    signature, values, attributes = {}, {}, {}
    for k, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name], values[k,] = "constexpr", constants[name]
            continue
        pointer = "*u8" if name == "reset_ptr" else "*fp32" if name in ("w_ptr", "b_ptr", "sums_ptr") else f"*{dtype}"
        signature[name] = pointer if name.endswith("_ptr") else "i32"
        if name not in convolution.FIXED:
            attributes[k,] = [["tt.divisibility", 16]]
    return made(kernel, signature, values, attributes, {"num_warps": tile.warps})


if __name__ == "__main__":
    for job in json.loads(sys.argv[1]):
        if job[0] == "convolution":
            print(json.dumps({"job": job[1:]} | compile_convolution(*job[1:])), flush=True)
            continue
        name, direction, launch, dtype, tiling = job
        print(
            json.dumps(
                compile_kernel(OWN.get(name) or getattr(ps.cells, name), direction, launch, dtype, Tiling(**tiling))
            ),
            flush=True,
        )
