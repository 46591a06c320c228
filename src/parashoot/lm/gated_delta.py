"""Gated DeltaNet, a linear RNN whose state is a matrix for each head (Yang et al. 2024, arXiv 2412.06464).

    S_t = a_t (I - b_t k_t k_t^T) S_{t-1} + b_t k_t v_t^T,   o_t = S_t^T q_t / sqrt(n),   a_t = exp(g_t)

On a GPU the kernels of flash-linear-attention run it in parallel over time.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import needs
from .config import ParaRNNConfig
from .conv import CausalConv
from .parts import ResidualLinear, RMSNorm


class GatedDelta(nn.Module):
    """W_out (norm(o) * silu(g)), o from q, k, v = silu(conv(W x)) with q and k of length one: (B, T, d) -> (B, T, d).

    q and k have d/2 channels in heads of n = `head_dim`, v has d in heads of 2n; b = sigmoid(W_b x), and the logarithm of the decay
    is -exp(A) softplus(W_a x + c). Of the past it needs the last inputs of the convolution (B, k - 1, 2d) and the state
    (B, H, n, 2n) in float32.
    """

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        d, self.head_dim = config.hidden_size, config.head_dim
        heads = d // (2 * self.head_dim)
        self.in_proj = nn.Linear(d, 3 * d, bias=False)
        self.rate_proj = nn.Linear(d, 2 * heads, bias=False)
        self.conv = CausalConv(2 * d, config.conv_kernel)
        self.A_log, self.dt_bias = nn.Parameter(torch.empty(heads)), nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(2 * self.head_dim, eps=config.rms_norm_eps)
        self.out_proj = ResidualLinear(d, d, bias=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Decay rates as in Mamba-2: exp(A) between 1 and 16, softplus(c) between 0.001 and 0.1, both nearly uniform in the logarithm."""
        nn.init.uniform_(self.A_log, 0.0, math.log(16))
        nn.init.uniform_(self.dt_bias, math.log(math.expm1(0.001)), math.log(math.expm1(0.1)))

    def forward(
        self, x: Tensor, past: tuple[Tensor, ...] | None, reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, T, d), the past, reset (B, T) bool -> (y (B, T, d), the past after x)."""
        d, n = x.shape[2], self.head_dim
        conv, state = past if past is not None else (None, None)
        qkv, gate = self.in_proj(x).split((2 * d, d), -1)
        qkv, conv_after = self.conv(qkv, conv, reset)
        qk, v = qkv.split((d, d), -1)
        exact = torch.promote_types(x.dtype, torch.float32)
        qk = qk.unflatten(-1, (2, -1, n)).to(exact)
        qk = qk * (qk.square().sum(-1, keepdim=True) + 1e-6).rsqrt()
        q, k, v = (qk[:, :, 0] * n**-0.5).to(v.dtype), qk[:, :, 1].to(v.dtype), v.unflatten(-1, (-1, 2 * n))
        a, b = self.rate_proj(x).to(exact).chunk(2, -1)
        g = -self.A_log.to(exact).exp() * F.softplus(a + self.dt_bias.to(exact))
        if x.shape[1] == 1 and state is not None and reset is None:
            o, state = step(state, *(t.squeeze(1).to(exact) for t in (q, k, v, g, b.sigmoid())))
            o = o.unsqueeze(1)
        else:
            o, state = delta_rule(q, k, v, g, b.sigmoid(), state, reset)  # type: ignore[misc]
        y = (self.norm(o.to(v.dtype)) * F.silu(gate.unflatten(-1, (-1, 2 * n)))).flatten(2)
        return self.out_proj(y), (conv_after, state)


def step(state: Tensor, q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """One step of the recurrence: S (B, H, n, m), q and k (B, H, n), v (B, H, m), g and b (B, H) -> (o (B, H, m), new S)."""
    state = g.exp()[..., None, None] * state
    change = b[..., None] * (v - (k[..., None] * state).sum(-2))
    state = state + k[..., None] * change[..., None, :]
    return (q[..., None] * state).sum(-2), state


@torch.compiler.disable
def delta_rule(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The recurrence over q and k (B, T, H, n), v (B, T, H, m), g and b (B, T, H) -> (o as v, the last state).

    On a CPU the loop over `step`, which is the reference; on a GPU fla's chunked kernel, and `MissingPackageError` without it.
    """
    if q.is_cuda:
        return _by_kernel(q, k, v, g, b, state, reset)
    if state is None:
        state = g.new_zeros(q.shape[0], *q.shape[2:], v.shape[-1])
    outputs = []
    for t in range(q.shape[1]):
        if reset is not None:
            state = state.masked_fill(reset[:, t, None, None, None], 0.0)
        o, state = step(state, *(x[:, t].to(g.dtype) for x in (q, k, v, g, b)))
        outputs.append(o)
    return torch.stack(outputs, 1).to(v.dtype), state


def _by_kernel(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, b: Tensor, state: Tensor | None, reset: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`delta_rule` by fla, which takes documents as sequences of different lengths one after the other."""
    rule, found = _fla()
    options: dict[str, Any] = {"scale": 1.0, "output_final_state": True}
    if reset is None:
        return rule(q, k, v, g, b, initial_state=state, **options)
    bounds, first, last = found(reset)
    if state is not None:
        kept = state.masked_fill(reset[:, 0, None, None, None], 0.0)
        state = kept.new_zeros(len(bounds) - 1, *kept.shape[1:]).index_copy(0, first, kept)
    flat = (t.flatten(0, 1)[None] for t in (q, k, v, g, b))
    o, after = rule(*flat, initial_state=state, cu_seqlens=bounds, **options)
    return o.view_as(v), after[last]


@functools.cache
def _fla() -> tuple[Callable[..., Any], Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]]:
    """The kernel, and `documents` that remembers its last results, so that all blocks of a pass wait for the GPU once."""
    module = needs("mixer = 'gated_delta' on a GPU", "baselines", "fla.ops.gated_delta_rule")
    return module.chunk_gated_delta_rule, needs("fla", "baselines", "fla.utils").tensor_cache(documents)


def documents(reset: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where documents begin, and all end, in the rows of reset (B, T) one after the other; each row's first and last document."""
    begins = reset.index_fill(1, torch.zeros(1, dtype=torch.int64, device=reset.device), True)
    bounds = F.pad(begins.flatten().nonzero().squeeze(1), (0, 1), value=reset.numel())
    last = begins.sum(1).cumsum(0) - 1
    return bounds, F.pad(last[:-1] + 1, (1, 0)), last
