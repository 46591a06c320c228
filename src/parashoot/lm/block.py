"""The block of the language model: a recurrent mixer and an MLP, as in ParaRNN (Danieli et al. 2025, arXiv 2510.21450).

    u, g = W_in norm(x);  y = cell(silu(conv(u)));  x <- s * x + W_out norm(y * silu(g));  x <- x + MLP(norm(x))

Of the past a block needs the last k - 1 inputs of its convolution, `conv` (B, k - 1, C), and the cell's `state` (1, B, S, C),
with C = state_expansion * d. One token after a past takes the cell's step, anything longer runs in parallel over time.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..cells.find import find_cell
from ..layers import RNN
from .config import ParaRNNConfig
from .conv import CausalConv


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * w, with w in the dtype of x, for which PyTorch has a fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ResidualLinear(nn.Linear):
    """A linear layer that writes to the residual stream, drawn narrower the more of them there are."""


class Mixer(nn.Module):
    """W_out norm(cell(silu(conv(u))) * silu(g)), with u, g = W_in x: (B, T, d) -> (B, T, d)."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        d, width = config.hidden_size, config.state_expansion * config.hidden_size
        heads, clip = config.num_heads, config.recurrent_clip
        self.in_proj = nn.Linear(d, 2 * width, bias=False)
        self.conv = CausalConv(width, config.conv_kernel)
        self.rnn = RNN(find_cell(config.cell), width, width, num_heads=heads, recurrent_clip=clip)
        self.norm = RMSNorm(width, eps=config.rms_norm_eps)
        self.out_proj = ResidualLinear(width, d, bias=False)

    def forward(
        self, x: Tensor, conv: Tensor | None, state: Tensor | None, reset: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d), the past `conv` and `state` -> (y (B, T, d), their values after the last step)."""
        u, g = self.in_proj(x).chunk(2, -1)
        u, conv_after = self.conv(u, conv, reset)
        if x.shape[1] == 1 and state is not None and reset is None:
            y, state_after = self.rnn.step(F.silu(u).squeeze(1), state)
            y = y.unsqueeze(1)
        else:
            y, state_after = self.rnn(F.silu(u), state, reset=reset)
        return self.out_proj(self.norm(y * F.silu(g))), conv_after, state_after


class SwiGLU(nn.Module):
    """W_down (silu(a) * b), with a, b = W_up x: (..., d) -> (..., d)."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.up_proj(x).chunk(2, -1)
        return self.down_proj(F.silu(a) * b)


class Block(nn.Module):
    """x <- s * x + mixer(norm(x)), with s learned for each channel, then x <- x + MLP(norm(x))."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = Mixer(config)
        self.residual_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, conv: Tensor | None = None, state: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, T, d), the past, reset (B, T) bool -> (x (B, T, d), the past after it)."""
        y, conv_after, state_after = self.mixer(self.mixer_norm(x), conv, state, reset)
        x = torch.addcmul(y, self.residual_scale, x)
        return x + self.mlp(self.mlp_norm(x)), conv_after, state_after
