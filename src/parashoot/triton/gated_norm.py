"""w * rms_norm(y * silu(g)) in one pass over y and g, and its gradient in one more over them and its own."""

# pyright: reportGeneralTypeIssues=false
# tl.range has no type that one can iterate over.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..tiling import processors_of
from .add_rows import add_rows
from .functions import sigmoid

PER_THREAD = 8  # channels
# Threads that a multiprocessor holds at once with the registers a pass takes: a program more waits for the others to end.
FORWARD, BACKWARD = 1280, 640


@triton.jit(do_not_specialize=("rows", "per"))
def forward(y_ptr, g_ptr, w_ptr, n_ptr, rows, per, C, eps, y_row, g_row, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """n = w z / sqrt(mean z^2 + eps), z = y silu(g)."""
    first = tl.program_id(0).to(tl.int64) * per
    col = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    for i in tl.range(per, num_stages=2):
        row, inside = first + i, (col < C) & (first + i < rows)
        g = tl.load(g_ptr + row * g_row + col, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_row + col, mask=inside, other=0.0).to(tl.float32)
        z = y * g * sigmoid(g, FAST)
        n = w * z * tl.rsqrt(tl.sum(z * z, 0) / C + eps)
        tl.store(n_ptr + row * C + col, n.to(n_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=("rows", "per"))
def backward(
    dn_ptr, y_ptr, g_ptr, w_ptr, dy_ptr, dg_ptr, sums_ptr, rows, per, C, eps, dn_row, y_row, g_row, dg_row,
    FAST: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """z = y silu(g), r = 1 / sqrt(mean z^2 + eps): dz = r (w dn - z r^2 mean(w dn z)); of this program's rows, sum dn z r."""
    first = tl.program_id(0).to(tl.int64) * per
    col = tl.arange(0, BLOCK)
    w = tl.load(w_ptr + col, mask=col < C, other=0.0).to(tl.float32)
    dw = tl.zeros([BLOCK], tl.float32)
    for i in tl.range(per, num_stages=2):  # the next row's loads are under way
        row, inside = first + i, (col < C) & (first + i < rows)
        g = tl.load(g_ptr + row * g_row + col, mask=inside, other=0.0).to(tl.float32)
        y = tl.load(y_ptr + row * y_row + col, mask=inside, other=0.0).to(tl.float32)
        dn = tl.load(dn_ptr + row * dn_row + col, mask=inside, other=0.0).to(tl.float32)
        s = sigmoid(g, FAST)
        silu = g * s
        r = tl.rsqrt(tl.sum(y * silu * (y * silu), 0) / C + eps)
        n = y * silu * r
        dw += dn * n
        dz = r * (w * dn - n * (tl.sum(w * dn * n, 0) / C))
        tl.store(dy_ptr + row * C + col, (dz * silu).to(dy_ptr.dtype.element_ty), mask=inside)
        dg = dz * y * (s + silu * (1.0 - s))
        tl.store(dg_ptr + row * dg_row + col, dg.to(dg_ptr.dtype.element_ty), mask=inside)
    tl.store(sums_ptr + tl.program_id(0) * C + col, dw, mask=col < C)


def run_forward(y: Tensor, g: Tensor, weight: Tensor, eps: float) -> Tensor:
    """n (..., C) from y and g (..., C) and weight (C,)."""
    n = torch.empty_like(y, memory_format=torch.contiguous_format)
    y, g = _rows(y), _rows(g)
    per, programs, options = _shared_out(y, FORWARD)
    if n.numel():
        with torch.cuda.device_of(y):
            sizes = len(y), per, y.shape[1], eps, y.stride(0), g.stride(0)
            forward[(programs,)](y, g, weight.contiguous(), n, *sizes, **options)
    return n


def run_backward(dn: Tensor, y: Tensor, g: Tensor, weight: Tensor, eps: float, dg: Tensor) -> tuple[Tensor, Tensor]:
    """(dy (..., C), dw (C,) in float32) from dn, y and g (..., C) and weight (C,); dg (..., C) is written where it lies."""
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    rows = [_rows(dn), _rows(y), _rows(g)]
    into = dg.view(rows[0].shape)
    per, programs, options = _shared_out(rows[0], BACKWARD)
    sums = y.new_empty(programs, y.shape[-1], dtype=torch.float32)
    if dy.numel():
        strides = [v.stride(0) for v in (*rows, into)]
        given = [*rows, weight.contiguous(), dy, into, sums, len(into), per, y.shape[-1], eps, *strides]
        with torch.cuda.device_of(y):
            backward[(programs,)](*given, **options)
    return dy, add_rows(sums)


def _rows(x: Tensor) -> Tensor:
    """(rows, C), with the channels of a row side by side."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()


def _shared_out(rows: Tensor, threads: int) -> tuple[int, int, dict[str, Any]]:
    """Rows a program, programs, options, so that all programs run at once on a device whose multiprocessors hold so many threads."""
    block = 1 << (rows.shape[1] - 1).bit_length()
    warps = min(32, max(1, block // (32 * PER_THREAD)))
    per = max(1, -(-len(rows) // (processors_of(rows.device) * max(1, threads // (32 * warps)))))
    return per, -(-len(rows) // per), {"FAST": rows.is_cuda, "BLOCK": block, "num_warps": warps}
