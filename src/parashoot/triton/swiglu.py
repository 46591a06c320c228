"""The gradient of silu(a) * b in one pass: both halves from one reading of a, b and dy."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .functions import sigmoid

BLOCK, WARPS = 1024, 4


@triton.jit
def backward(ab_ptr, dy_ptr, dab_ptr, ab_row, dy_row, C, tiles, FAST: tl.constexpr, BLOCK: tl.constexpr):
    """da = dy b (s + a s (1 - s)), db = dy a s, with s = 1 / (1 + e^-a)."""
    program = tl.program_id(0)
    row, col = (program // tiles).to(tl.int64), program % tiles * BLOCK + tl.arange(0, BLOCK)
    inside = col < C
    at = ab_ptr + row * ab_row + col
    a = tl.load(at, mask=inside, other=0.0).to(tl.float32)
    b = tl.load(at + C, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + row * dy_row + col, mask=inside, other=0.0).to(tl.float32)
    s = sigmoid(a, FAST)
    silu = a * s
    at = dab_ptr + row * 2 * C + col
    tl.store(at, (dy * b * (s + silu * (1.0 - s))).to(dab_ptr.dtype.element_ty), mask=inside)
    tl.store(at + C, (dy * silu).to(dab_ptr.dtype.element_ty), mask=inside)


def run_backward(ab: Tensor, dy: Tensor) -> Tensor:
    """The gradient (..., 2 C) by ab = [a, b] (..., 2 C) from dy (..., C), in the dtype of ab."""
    dab, width = torch.empty_like(ab, memory_format=torch.contiguous_format), dy.shape[-1]
    rows, given = ab.reshape(-1, 2 * width), dy.reshape(-1, width)
    rows, given = (v if v.stride(1) == 1 else v.contiguous() for v in (rows, given))
    tiles = -(-width // BLOCK)
    options = {"FAST": ab.is_cuda, "BLOCK": BLOCK, "num_warps": WARPS}
    if dab.numel():
        with torch.cuda.device_of(ab):
            backward[(len(rows) * tiles,)](rows, given, dab, rows.stride(0), given.stride(0), width, tiles, **options)
    return dab
