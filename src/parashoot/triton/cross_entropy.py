"""Cross-entropy and z-loss of logits by row, and their gradient in place of the logits, each read from memory once: the second
pass over a row finds it in the GPU's cache, for few rows are worked on at a time."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK, WARPS = 4096, 16  # logits at a time


@triton.jit
def score(logits_ptr, targets_ptr, sums_ptr, row_stride, V, z_loss, ignored, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    """lse - l[target] + z lse^2 and z lse^2 of a row l; GRAD: l <- (1 + 2 z lse) softmax(l) - onehot. Zero where the target is `ignored`,
    NaN where it is none of the V."""
    row = tl.program_id(0)
    target = tl.load(targets_ptr + row)
    scored = target != ignored
    logits_ptr += row.to(tl.int64) * row_stride
    col = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, V, BLOCK):
        v = tl.load(logits_ptr + start + col, mask=start + col < V, other=float("-inf")).to(tl.float32)
        new = tl.maximum(largest, v, propagate_nan=tl.PropagateNan.ALL)
        kept = tl.where(new == float("-inf"), 0.0, new)  # nothing but minus infinity so far
        total = total * tl.exp(largest - kept) + tl.exp(v - kept)
        largest = new
    top = tl.max(largest, 0)
    lse = top + tl.log(tl.sum(total * tl.exp(largest - top), 0))
    there = (target >= 0) & (target < V)
    lse = tl.where(there | (scored == 0), lse, float("nan"))
    hit = tl.load(logits_ptr + tl.where(there, target, 0)).to(tl.float32)
    square = z_loss * lse * lse
    tl.store(sums_ptr + 2 * row, tl.where(scored, lse - hit + square, 0.0))
    tl.store(sums_ptr + 2 * row + 1, tl.where(scored, square, 0.0))
    if GRAD:
        tl.debug_barrier()  # the target's logit has been read
        scale = 1.0 + 2.0 * z_loss * lse
        last = (V - 1) // BLOCK * BLOCK
        for back in range(0, V, BLOCK):  # the latest first
            at = last - back + col
            v = tl.load(logits_ptr + at, mask=at < V, other=0.0).to(tl.float32)
            g = scale * tl.exp(v - lse) - (at == target).to(tl.float32)
            tl.store(logits_ptr + at, tl.where(scored, g, 0.0).to(logits_ptr.dtype.element_ty), mask=at < V)


def run_score(logits: Tensor, targets: Tensor, z_loss: float, ignored: int, wanted: bool) -> tuple[Tensor, Tensor]:
    """Sums over rows (N, V) of the loss and of the z-loss in it, float32; `wanted`: `logits` become their gradient of the former."""
    rows, width = logits.shape
    sums = logits.new_empty(rows, 2, dtype=torch.float32)
    options = {"GRAD": wanted, "BLOCK": BLOCK, "num_warps": WARPS}
    with torch.cuda.device_of(logits):
        score[(rows,)](logits, targets, sums, logits.stride(0), width, z_loss, ignored, **options)
    loss, square = sums.sum(0).unbind(0)
    return loss, square
