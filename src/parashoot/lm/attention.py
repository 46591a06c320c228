"""Causal attention with rotary positions, the mixer of a Transformer (Vaswani et al. 2017; Su et al. 2021, arXiv 2104.09864)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ParaRNNConfig
from .parts import ResidualLinear

BASE = 10000.0


class Attention(nn.Module):
    """W_out softmax(R q (R k)^T / sqrt(n)) v over j <= i, with q, k, v = W_qkv x in heads of n = `head_dim`; R turns by position.

    Of the past it needs all keys and values, each (B, T, H, n), and once documents or padding were seen the place `begun` (B,) at
    which the text of each row began. Only then is there a mask, which PyTorch's flash attention does not take: its
    memory-efficient attention runs instead, slower, and the mask itself is (B, T, T).
    """

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        d = config.hidden_size
        self.head_dim = config.head_dim
        self.qkv_proj = nn.Linear(d, 3 * d, bias=False)
        self.out_proj = ResidualLinear(d, d, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, ...] | None, reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, T, d), the past, reset (B, T) bool -> (y (B, T, d), the past after x)."""
        keys, values, *rest = past if past is not None else (None, None)
        time, before, begun = x.shape[1], 0 if keys is None else keys.shape[1], rest[0] if rest else None
        qkv = self.qkv_proj(x).unflatten(-1, (3, -1, self.head_dim))
        (q, k), v = rotated(qkv[:, :, :2], before).unbind(2), qkv[:, :, 2]
        if keys is not None and values is not None:
            k, v = torch.cat([keys.to(k.dtype), k], 1), torch.cat([values.to(v.dtype), v], 1)
        after, mask = (k, v), None
        if begun is not None or reset is not None or (before and time > 1):
            i, j = torch.arange(before, before + time, device=x.device), torch.arange(before + time, device=x.device)
            mask = j <= i[:, None]
            if begun is not None or reset is not None:
                first = i.new_zeros(x.shape[0], 1) if begun is None else begun[:, None]
                first = first.expand(-1, time)
                if reset is not None:
                    first = torch.maximum(first, torch.where(reset, i, 0).cummax(1).values)
                mask = (mask & (j >= first[:, :, None]))[:, None]
                after = (k, v, first[:, -1].clone())
        heads = [t.transpose(1, 2) for t in (q, k, v)]
        y = F.scaled_dot_product_attention(*heads, attn_mask=mask, is_causal=mask is None and not before)
        return self.out_proj(y.transpose(1, 2).flatten(2)), after


def rotated(x: Tensor, start: int) -> Tensor:
    """x (B, T, ..., n), each pair (x_m, x_{m + n/2}) turned by t BASE^(-2m/n) with t = start, start + 1, ...; in x's dtype.

    Angles and products are in float32 or better.
    """
    exact, half = torch.promote_types(x.dtype, torch.float32), x.shape[-1] // 2
    table = rotations(start, x.shape[1], half, exact, x.device).view(2, x.shape[1], *[1] * (x.dim() - 3), half)
    (cos, sin), (a, b) = table.unbind(0), x.to(exact).chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


@torch.library.custom_op("parashoot::rotations", mutates_args=())
def rotations(start: int, time: int, half: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Cosines and sines (2, T, n / 2) of the angles. An operator, or a compiler would compute them for every element of x again."""
    t = torch.arange(start, start + time, device=device, dtype=dtype)
    angle = t[:, None] * BASE ** -(torch.arange(half, device=device, dtype=dtype) / half)
    return torch.stack([angle.cos(), angle.sin()])


@rotations.register_fake
def _(start, time, half, dtype, device):
    return torch.empty(2, time, half, dtype=dtype, device=device)
