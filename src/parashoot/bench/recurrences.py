"""The recurrences of other people's layers and kernels as plain loops: the truth that those contestants are judged by.

Each takes tensors in any dtype, starts from a zero state and is differentiated by autograd.
"""

from __future__ import annotations

import torch
from torch import Tensor


def dense_gru(x: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor) -> Tensor:
    """`torch.nn.GRU`: x (B, T, D), w_x (3C, D), w_h (3C, C) -> (B, T, C)."""
    h, ys = x.new_zeros(x.shape[0], w_h.shape[1]), []
    for gates in (x @ w_x.mT + b_x).unbind(1):
        r, z, n = gates.chunk(3, -1)
        h_r, h_z, h_n = (h @ w_h.mT + b_h).chunk(3, -1)
        n = torch.tanh(n + torch.sigmoid(r + h_r) * h_n)
        h = n + torch.sigmoid(z + h_z) * (h - n)
        ys.append(h)
    return torch.stack(ys, 1)


def dense_lstm(x: Tensor, w_x: Tensor, w_h: Tensor, b_x: Tensor, b_h: Tensor) -> Tensor:
    """`torch.nn.LSTM`: x (B, T, D), w_x (4C, D), w_h (4C, C) -> h (B, T, C)."""
    h = c = x.new_zeros(x.shape[0], w_h.shape[1])
    ys = []
    for gates in (x @ w_x.mT + b_x).unbind(1):
        i, f, g, o = (gates + h @ w_h.mT + b_h).chunk(4, -1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
        h = torch.sigmoid(o) * torch.tanh(c)
        ys.append(h)
    return torch.stack(ys, 1)


def head_lstm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """FlashRNN's LSTM: x (B, T, 4, H, D), w (4, H, D, D), b (4, H, D) -> h (B, T, H, D)."""
    h = c = x.new_zeros(x.shape[0], *x.shape[3:])
    ys = []
    for gates in (x + b).unbind(1):
        i, f, z, o = (gates + torch.einsum("ghdp,bhp->bghd", w, h)).unbind(1)
        c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(z)
        h = torch.sigmoid(o) * torch.tanh(c)
        ys.append(h)
    return torch.stack(ys, 1)


def linear(decay: Tensor, x: Tensor, axis: int) -> Tensor:
    """h_t = decay_t h_{t-1} + x_t along `axis`, elementwise."""
    h, ys = torch.zeros_like(x.select(axis, 0)), []
    for d, v in zip(decay.unbind(axis), x.unbind(axis), strict=True):
        h = d * h + v
        ys.append(h)
    return torch.stack(ys, axis)


def gated_delta(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule: q, k (B, T, H, K), v (B, T, H, V), g, beta (B, T, H) -> (B, T, H, V). Yang et al. 2024.

    S = e^g S + beta k (v - (e^g S)^T k)^T,  y = S^T q / sqrt(K)
    """
    state, ys = q.new_zeros(*q.shape[:1], *q.shape[2:], v.shape[-1]), []
    for q_t, k_t, v_t, g_t, beta_t in zip(
        *(a.unbind(1) for a in (q * q.shape[-1] ** -0.5, k, v, g, beta)), strict=True
    ):
        state = state * g_t.exp()[..., None, None]
        seen = torch.einsum("bhkv,bhk->bhv", state, k_t)
        state = state + k_t[..., None] * (beta_t[..., None] * (v_t - seen))[..., None, :]
        ys.append(torch.einsum("bhkv,bhk->bhv", state, q_t))
    return torch.stack(ys, 1)
