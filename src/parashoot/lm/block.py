"""The block of the language model: a mixer of tokens and an MLP, as in ParaRNN (Danieli et al. 2025, arXiv 2510.21450).

    x <- s * x + mixer(norm(x));  x <- x + MLP(norm(x))

A mixer maps x (B, T, d), what it kept of the past (a tuple of tensors with the batch in front, None at the beginning) and reset
(B, T) bool or None to y (B, T, d) and the past after x.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..cells.find import find_cell
from ..layers import RNN
from .attention import Attention
from .config import ParaRNNConfig
from .gate import GatedNorm, HalfConv
from .gated_delta import GatedDelta
from .mlp import SwiGLU
from .parts import ResidualLinear, RMSNorm


class Recurrence(nn.Module):
    """W_out norm(cell(silu(conv(u))) * silu(g)), with u, g = W_in x: (B, T, d) -> (B, T, d).

    Of the past it needs the last k - 1 inputs of its convolution (B, k - 1, C) and the cell's state (B, S, C), with
    C = state_expansion * d. One token after a past takes the cell's step, anything longer runs in parallel over time.
    """

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        d, width = config.hidden_size, config.state_expansion * config.hidden_size
        heads, start = config.num_heads, {"recurrent_clip": config.recurrent_clip, "initial_bias": config.initial_bias}
        self.in_proj = nn.Linear(d, 2 * width, bias=False)
        self.conv = HalfConv(width, config.conv_kernel, heads)
        self.rnn = RNN(find_cell(config.cell), width, width, num_heads=heads, **start)
        self.norm = GatedNorm(width, eps=config.rms_norm_eps)
        self.out_proj = ResidualLinear(width, d, bias=False)

    def forward(
        self, x: Tensor, past: tuple[Tensor, ...] | None, reset: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, T, d), the past, reset (B, T) bool -> (y (B, T, d), the past after x)."""
        conv, state = (past[0], past[1].unsqueeze(0)) if past is not None else (None, None)
        u, ug, conv = self.conv(self.in_proj(x), conv, reset)
        calls = hasattr(self.rnn, "_hf_hook")  # accelerate brings weights from elsewhere when a module is called
        if x.shape[1] == 1 and state is not None and reset is None and not calls:
            y, state = self.rnn.step(u.flatten(2).squeeze(1), state)
            y = y.unsqueeze(1)
        else:
            y, state = self.rnn(u, state, reset=reset)
        return self.out_proj(self.norm(y, ug, self.conv.fused(ug))), (conv, state.squeeze(0))


MIXERS = {"rnn": Recurrence, "attention": Attention, "gated_delta": GatedDelta}
"""`mixer` of the configuration -> its class."""


class Block(nn.Module):
    """x <- s * x + mixer(norm(x)), with s learned for each channel, then x <- x + MLP(norm(x))."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        self.mixer_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mixer = MIXERS[config.mixer](config)
        self.residual_scale = nn.Parameter(torch.ones(config.hidden_size))
        self.mlp_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = SwiGLU(config)

    def forward(
        self, x: Tensor, past: tuple[Tensor, ...] | None = None, reset: Tensor | None = None, keep: bool = True
    ) -> tuple[Tensor, tuple[Tensor, ...]]:
        """x (B, T, d), the past, reset (B, T) bool -> (x (B, T, d), the past after it, empty unless `keep`)."""
        y, after = self.mixer(self.mixer_norm(x), past, reset)
        x = torch.addcmul(y, self.residual_scale.to(x.dtype), x)
        return x + self.mlp(self.mlp_norm(x)), after if keep else ()
