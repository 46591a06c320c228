"""The sum over the rows of a matrix of partial sums, as programs leave them: some hundreds of rows, long ones."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS = 128  # loaded at once
LEAST = 2**18  # numbers, below which the launch is what costs
MOST = 2048  # rows, above which several programs a column pay


@triton.jit(do_not_specialize=("rows",))
def add(x_ptr, out_ptr, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A program for COLUMNS of them, always in the same order."""
    row = tl.arange(0, ROWS)[:, None].to(tl.int64)
    col = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, rows, ROWS):
        inside = (first + row < rows) & (col < columns)[None, :]
        total += tl.load(x_ptr + (first + row) * columns + col[None, :], mask=inside, other=0.0)
    tl.store(out_ptr + col, tl.sum(total, 0), mask=col < columns)


def add_rows(parts: Tensor) -> Tensor:
    """parts (N, ...) in float32 -> their sum (...)."""
    worth = parts.is_cuda and parts.numel() >= LEAST and len(parts) <= MOST
    return run(parts) if worth else parts.sum(0)


def run(parts: Tensor) -> Tensor:
    """The same by the kernel, which starts more programs than `torch.sum` does."""
    out = parts.new_empty(parts.shape[1:])
    block, warps = (32, 8) if out.numel() >= 4096 else (8, 4)
    given = [parts, out, len(parts), out.numel()]
    sizes = {"ROWS": ROWS, "COLUMNS": block, "num_warps": warps}
    with torch.cuda.device_of(parts):
        add[(-(-out.numel() // block),)](*given, **sizes)
    return out
