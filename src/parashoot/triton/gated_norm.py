"""The gradient of rms_norm(y * silu(g)) * w in one pass over y, g and its own gradient."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_rows import add_rows
from .functions import sigmoid

PER_THREAD = 8  # channels
RESIDENT = 640  # threads that a multiprocessor holds at once with the registers this takes: a program more waits for the others to end


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


def run_backward(dn: Tensor, y: Tensor, g: Tensor, weight: Tensor, eps: float, dg: Tensor) -> tuple[Tensor, Tensor]:
    """(dy (..., C), dw (C,) in float32) from dn, y and g (..., C) and weight (C,); dg (..., C) is written where it lies."""
    width = y.shape[-1]
    dy = torch.empty_like(y, memory_format=torch.contiguous_format)
    rows = [v.reshape(-1, width) for v in (dn, y, g)]
    rows = [v if v.stride(1) == 1 else v.contiguous() for v in rows]
    into = dg.view(-1, width)
    block = 1 << (width - 1).bit_length()
    warps = min(32, max(1, block // (32 * PER_THREAD)))
    processors = torch.cuda.get_device_properties(y.device).multi_processor_count if y.is_cuda else 1
    per = max(1, -(-len(into) // (processors * max(1, RESIDENT // (32 * warps)))))
    programs = -(-len(into) // per)
    sums = y.new_empty(programs, width, dtype=torch.float32)
    options = {"FAST": y.is_cuda, "BLOCK": block, "num_warps": warps}
    if dy.numel():
        strides = [v.stride(0) for v in (*rows, into)]
        given = [*rows, weight.contiguous(), dy, into, sums, len(into), per, width, eps, *strides]
        with torch.cuda.device_of(y):
            backward[(programs,)](*given, **options)
    return dy, add_rows(sums)
