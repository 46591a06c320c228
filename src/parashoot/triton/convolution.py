"""Kernels of the causal convolution: forward in one pass over u, backward in one pass over u and dy.

A program takes BLOCK channels and STEPS positions of one sequence and walks them in order, with the last k - 1 inputs, and backward
the k - 1 gradients not yet complete, in registers: each element is loaded once and activated once, no sum crosses threads, and the
loads of GROUP positions are under way together.
"""

# pyright: reportGeneralTypeIssues=false
# tl.static_range has no type that one can iterate over.

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .add_rows import add_rows
from .functions import sigmoid


class Tile(NamedTuple):
    """What a program takes: channels, positions, positions loaded together (a divisor), warps."""

    block: int
    steps: int
    group: int
    warps: int


def tile_for(direction: str, taps: int) -> Tile:
    """Backward with few taps a thread has registers for four channels, else for two."""
    return Tile(128, 64, 8, 2) if direction == "forward" else Tile(128, 128, 4, 1 if taps <= 4 else 2)


FIXED = ("T", "segments", "r_b", "r_t")  # lengths compile nothing new


@triton.jit
def _place(T, C, segments, STEPS: tl.constexpr, BLOCK: tl.constexpr):
    """Channels, sequence, first position and positions left of this program: on one grid axis, for only the first may be long."""
    tiles, program = (C + BLOCK - 1) // BLOCK, tl.program_id(0)
    part, t0 = program // tiles, program // tiles % segments * STEPS
    return program % tiles * BLOCK + tl.arange(0, BLOCK), (part // segments).to(tl.int64), t0, T - t0


@triton.jit
def _taps(w_ptr, b_ptr, col, C, K: tl.constexpr):
    """The K weights of each channel, and its bias."""
    w = ()
    for j in tl.static_range(K):
        w += (tl.load(w_ptr + j * C + col, mask=col < C, other=0.0).to(tl.float32),)
    return w, tl.load(b_ptr + col, mask=col < C, other=0.0).to(tl.float32)


@triton.jit
def _rows(ptr, t, step, left, col, C, N: tl.constexpr):
    """N rows from t on, zero where none is left."""
    rows = ()
    for i in tl.static_range(N):
        rows += (tl.load(ptr + (t + i) * step + col, mask=(col < C) & (t + i < left), other=0.0),)
    return rows


@triton.jit
def _begins(reset_ptr, t, r_t, first, left, N: tl.constexpr, RESET: tl.constexpr):
    """Whether a document begins at each of N positions from t on."""
    begins = ()
    for i in tl.static_range(N):
        if RESET:
            inside = (t + i >= first) & (t + i < left)
            begins += (tl.load(reset_ptr + (t + i) * r_t, mask=inside, other=0) != 0,)
    return begins


@triton.jit
def _before(
    u_ptr, past_ptr, reset_ptr, t0, u_t, p_t, r_t, left, col, C, K: tl.constexpr, PAST: tl.constexpr, RESET: tl.constexpr
):  # fmt: skip
    """The K - 1 inputs before t0, latest first, and how long before t0 - 1 a document began, if less than K."""
    window = ()
    begins = _begins(reset_ptr, 1 - K, r_t, -t0, left, K - 1, RESET)
    age = t0 * 0 + K
    for j in tl.static_range(1, K):
        u = tl.load(u_ptr - j * u_t + col, mask=(col < C) & (t0 >= j), other=0.0).to(tl.float32)
        if PAST:
            u += tl.load(past_ptr + (t0 - j + K - 1) * p_t + col, mask=(col < C) & (t0 < j), other=0.0).to(tl.float32)
        window += (u,)
        if RESET:
            age = tl.where(begins[j - 1], 0, age + 1)
    return window, age


@triton.jit
def _activated(u, window, w, bias, age, K: tl.constexpr, RESET: tl.constexpr, FAST: tl.constexpr):
    """The K inputs that reach a position, latest first, their weighted sum z and its sigmoid."""
    inputs = (u,)
    z = bias + w[0] * u
    for j in tl.static_range(1, K):
        v = window[j - 1]
        if RESET:
            v = tl.where(age >= j, v, 0.0)
        inputs += (v,)
        z += w[j] * v
    return inputs, z, sigmoid(z, FAST)


@triton.jit(do_not_specialize=FIXED)
def forward(
    u_ptr, w_ptr, b_ptr, past_ptr, reset_ptr, y_ptr, T, C, segments, u_b, u_t, p_b, p_t, r_b, r_t,
    K: tl.constexpr, PAST: tl.constexpr, RESET: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """y = silu(z), z_t = b + sum_j w_j u_{t-j}."""
    col, b, t0, left = _place(T, C, segments, STEPS, BLOCK)
    u_ptr += b * u_b + t0.to(tl.int64) * u_t
    past_ptr += b * p_b
    reset_ptr += b * r_b + t0.to(tl.int64) * r_t
    y_ptr += (b * T + t0) * C
    w, bias = _taps(w_ptr, b_ptr, col, C, K)
    window, age = _before(u_ptr, past_ptr, reset_ptr, t0, u_t, p_t, r_t, left, col, C, K, PAST, RESET)
    for t in range(0, STEPS, GROUP):
        us = _rows(u_ptr, t, u_t, left, col, C, GROUP)
        begins = _begins(reset_ptr, t, r_t, 0, left, GROUP, RESET)
        for i in tl.static_range(GROUP):
            if RESET:
                age = tl.where(begins[i], 0, age + 1)
            inputs, z, s = _activated(us[i].to(tl.float32), window, w, bias, age, K, RESET, FAST)
            row = y_ptr + (t + i) * C + col
            tl.store(row, (z * s).to(y_ptr.dtype.element_ty), mask=(col < C) & (t + i < left))
            window = inputs[: K - 1]


@triton.jit
def _back(
    u_ptr, dy_ptr, reset_ptr, du_ptr, dpast_ptr, t, t0, left, col, C, u_t, dy_t, du_t, r_t, w, bias, window, pending, sums, age,
    N: tl.constexpr, K: tl.constexpr, PAST: tl.constexpr, RESET: tl.constexpr, FAST: tl.constexpr,
):  # fmt: skip
    """N positions from t on: `pending` are the gradients of the K - 1 inputs before, so far, `sums` those of the taps and the bias."""
    us = _rows(u_ptr, t, u_t, left, col, C, N)
    dys = _rows(dy_ptr, t, dy_t, left, col, C, N)
    begins = _begins(reset_ptr, t, r_t, 0, left, N, RESET)
    for i in tl.static_range(N):
        if RESET:
            age = tl.where(begins[i], 0, age + 1)
        inputs, z, s = _activated(us[i].to(tl.float32), window, w, bias, age, K, RESET, FAST)
        dz = dys[i].to(tl.float32) * s * (1.0 + z * (1.0 - s))  # zero where none is left, for dy is
        grads = (w[0] * dz,)
        for j in tl.static_range(1, K):
            part = w[j] * dz
            if RESET:
                part = tl.where(age >= j, part, 0.0)
            grads += (pending[j - 1] + part,)
        at = t + i - K + 1
        du = grads[K - 1]
        tl.store(du_ptr + at * du_t + col, du.to(du_ptr.dtype.element_ty), mask=(col < C) & (at >= 0) & (at < left))
        if PAST:
            row = dpast_ptr + (t + i) * C + col
            tl.store(row, du.to(dpast_ptr.dtype.element_ty), mask=(col < C) & (t0 + at < 0))
        new = ()
        for j in tl.static_range(K):
            new += (sums[j] + dz * inputs[j],)
        sums = new + (sums[K] + dz,)  # noqa: RUF005
        window, pending = inputs[: K - 1], grads[: K - 1]
    return window, pending, sums, age


@triton.jit(do_not_specialize=FIXED)
def backward(
    u_ptr, dy_ptr, w_ptr, b_ptr, past_ptr, reset_ptr, du_ptr, dpast_ptr, sums_ptr, T, C, segments, u_b, u_t, dy_b, dy_t, dy_h, du_b, du_t,
    p_b, p_t, r_b, r_t, width,
    K: tl.constexpr, PAST: tl.constexpr, RESET: tl.constexpr, FAST: tl.constexpr, BLOCK: tl.constexpr, STEPS: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """dz = dy silu'(z); du_s = sum_j w_j dz_{s+j}; of this segment, sum_t dz_t u_{t-j} and sum_t dz_t. dy lies in heads of `width`."""
    col, b, t0, left = _place(T, C, segments, STEPS, BLOCK)
    u_ptr += b * u_b + t0.to(tl.int64) * u_t
    head = tl.program_id(0) % ((C + BLOCK - 1) // BLOCK) * BLOCK // width
    dy_ptr += b * dy_b + t0.to(tl.int64) * dy_t + head.to(tl.int64) * (dy_h - width)
    past_ptr += b * p_b
    reset_ptr += b * r_b + t0.to(tl.int64) * r_t
    du_ptr += b * du_b + t0.to(tl.int64) * du_t
    dpast_ptr += b * (K - 1) * C
    w, bias = _taps(w_ptr, b_ptr, col, C, K)
    window, age = _before(u_ptr, past_ptr, reset_ptr, t0, u_t, p_t, r_t, left, col, C, K, PAST, RESET)
    zero = tl.zeros([BLOCK], tl.float32)
    pending, sums = (zero,) * (K - 1), (zero,) * (K + 1)
    for t in range(0, STEPS, GROUP):
        window, pending, sums, age = _back(
            u_ptr, dy_ptr, reset_ptr, du_ptr, dpast_ptr, t, t0, left, col, C, u_t, dy_t, du_t, r_t, w, bias, window, pending, sums, age,
            GROUP, K, PAST, RESET, FAST,
        )  # fmt: skip
    _back(  # the next segment's first: their sums are its own
        u_ptr, dy_ptr, reset_ptr, du_ptr, dpast_ptr, STEPS, t0, left, col, C, u_t, dy_t, du_t, r_t, w, bias, window, pending, sums, age,
        K - 1, K, PAST, RESET, FAST,
    )  # fmt: skip
    sums_ptr += (b * segments + t0 // STEPS) * (K + 1) * C
    for j in tl.static_range(K + 1):
        tl.store(sums_ptr + j * C + col, sums[j], mask=col < C)


def _launch(
    kernel: Any, tile: Tile, u: Tensor, past: Tensor | None, reset: Tensor | None, taps: int, **given: Any
) -> None:
    (batch, time, channels), u = u.shape, _near(u)
    before, mask = u if past is None else _near(past), u if reset is None else reset.view(torch.uint8)
    segments = -(-time // tile.steps)
    given |= {"T": time, "C": channels, "segments": segments, "u_ptr": u, "past_ptr": before, "reset_ptr": mask}
    for name, x in (("u", u), ("p", before), ("r", mask)):
        given |= {f"{name}_b": x.stride(0), f"{name}_t": x.stride(1)}
    kinds = {"K": taps, "PAST": past is not None and taps > 1, "RESET": reset is not None, "FAST": u.is_cuda}
    sizes = {"BLOCK": tile.block, "STEPS": tile.steps, "GROUP": tile.group, "num_warps": tile.warps}
    if u.numel():
        with torch.cuda.device_of(u):
            kernel[-(-channels // tile.block) * segments * batch,](**given, **kinds, **sizes)


def _near(x: Tensor) -> Tensor:
    """x, copied where its channels do not lie side by side, or its rows too far apart for offsets of 32 bits in a segment."""
    return x if x.stride(2) == 1 and x.stride(1) < 2**22 else x.contiguous()


def run_forward(u: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, reset: Tensor | None) -> Tensor:
    """u (B, T, C), weight (k, C), bias (C,), past (B, k - 1, C), reset (B, T) bool -> y (B, T, C), in the dtype of u."""
    y, taps = u.new_empty(u.shape), len(weight)
    given = {"w_ptr": weight.contiguous(), "b_ptr": bias.contiguous(), "y_ptr": y}
    _launch(forward, tile_for("forward", taps), u, past, reset, taps, **given)
    return y


def run_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, reset: Tensor | None, du: Tensor
) -> tuple[Tensor, Tensor]:
    """(gradients (k + 1, C) in float32 of weight and, the last row, bias, dpast, which is empty without a past).

    dy (B, T, H, C / H): channels in heads, which may lie wherever they do; du (B, T, C or more), contiguous, takes the gradient of u in
    its first C channels.
    """
    (batch, time, channels), taps = u.shape, len(weight)
    tile = tile_for("backward", taps)
    if dy.stride(3) != 1 or dy.stride(1) >= 2**22 or (dy.shape[2] > 1 and dy.shape[3] % tile.block):
        dy = dy.reshape(batch, time, 1, channels).contiguous()
    dpast = u.new_empty(0) if past is None else past.new_empty(past.shape)
    sums = u.new_empty(batch * -(-time // tile.steps), taps + 1, channels, dtype=torch.float32)
    given = {"w_ptr": weight.contiguous(), "b_ptr": bias.contiguous(), "dy_ptr": dy, "du_ptr": du}
    given |= {"dpast_ptr": dpast, "sums_ptr": sums, "dy_b": dy.stride(0), "dy_t": dy.stride(1), "dy_h": dy.stride(2)}
    given |= {"width": dy.shape[3], "du_b": du.stride(0), "du_t": du.stride(1)}
    _launch(backward, tile, u, past, reset, taps, **given)
    return add_rows(sums), dpast
