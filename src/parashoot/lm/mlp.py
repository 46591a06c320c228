"""The MLP of the language model's blocks, with a gate whose gradient is one pass."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ParaRNNConfig
from .parts import STORED, TRITON, ResidualLinear, first_derivative_only


class SwiGLU(nn.Module):
    """W_down (silu(a) * b), with a, b = W_up x: (..., d) -> (..., d)."""

    def __init__(self, config: ParaRNNConfig):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, 2 * config.intermediate_size, bias=False)
        self.down_proj = ResidualLinear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        ab = self.up_proj(x)
        fused = TRITON and ab.is_cuda and ab.dtype in STORED
        return self.down_proj(_Gated.apply(ab) if fused else gated(ab))


def gated(ab: Tensor) -> Tensor:
    """silu(a) * b for ab = [a, b] (..., 2 C): (..., C)."""
    a, b = ab.chunk(2, -1)
    return F.silu(a) * b


class _Gated(torch.autograd.Function):
    """`gated` with one kernel behind it: torch.compile would read a, b and dy once for each half of the gradient."""

    @staticmethod
    def forward(ctx, ab: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(ab)
        return gated(ab)

    @staticmethod
    def backward(ctx, dy: Tensor) -> Tensor:  # type: ignore[override]
        first_derivative_only("SwiGLU")
        return swiglu_backward(ctx.saved_tensors[0], dy)


@torch.library.custom_op("parashoot::swiglu_backward", mutates_args=())
def swiglu_backward(ab: Tensor, dy: Tensor) -> Tensor:
    """The gradient (..., 2 C) by ab (..., 2 C) of `gated`, from dy (..., C)."""
    from ..triton.swiglu import run_backward  # Triton is imported where it is used

    return run_backward(ab, dy)


@swiglu_backward.register_fake
def _(ab, dy):
    return ab.new_empty(ab.shape)
