"""A causal depthwise convolution with its SiLU that continues from its past and never reaches across a reset."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import STORED, TRITON, first_derivative_only

WIDEST = 8  # taps the kernels hold in registers


class CausalConv(nn.Module):
    """y_t = silu(b + sum_{j < k} w_j u_{t-j}), for each channel by itself; the sum ends where a new sequence began.

    On a GPU more than one position runs in kernels that read and write each element once, forward and backward. y has its channels in
    `heads`, as what follows takes them: its gradient then need not be put together.
    """

    def __init__(self, channels: int, kernel: int, heads: int = 1):
        super().__init__()
        self.heads = heads
        self.weight = nn.Parameter(torch.empty(kernel, channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform with variance 1/(3k), as `nn.Conv1d` draws them; bias zero."""
        nn.init.uniform_(self.weight, -(self.weight.shape[0] ** -0.5), self.weight.shape[0] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, u: Tensor, past: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u (B, T, C), past inputs (B, k - 1, C) or None for zeros, reset (B, T) bool -> (y (B, T, C), past after u).

        With several heads y is (B, T, H, C / H). In the returned past, inputs from before the last reset are zero, so it needs no mask of its own.
        """
        run = causal_conv if self.fused(u) else shifted_products
        y = run(u, self.weight, self.bias, past, reset, self.heads)
        return y if self.heads > 1 else y.flatten(2), self.after(u, past, reset)

    def fused(self, u: Tensor) -> bool:
        """Whether kernels run u (B, T, C or more)."""
        return TRITON and u.is_cuda and u.shape[1] > 1 and u.dtype in STORED and len(self.weight) <= WIDEST

    def after(self, u: Tensor, past: Tensor | None, reset: Tensor | None) -> Tensor:
        """The past (B, k - 1, C) after u (B, T, C)."""
        taps, time = self.weight.shape[0], u.shape[1]
        last = _joined(past, u[:, max(time - taps + 1, 0) :], taps - 1)
        after = last[:, last.shape[1] - taps + 1 :]
        if reset is not None:
            document = F.pad(reset.cumsum(1), (taps - 1, 0))
            return after.masked_fill((document[:, time:] != document[:, -1:])[:, :, None], 0.0)
        return after.clone()


def _joined(past: Tensor | None, u: Tensor, reach: int) -> Tensor:
    """u after its past, zeros where there is none."""
    return F.pad(u, (0, 0, reach, 0)) if past is None else torch.cat([past.to(u.dtype), u], 1)


def shifted_products(
    u: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, reset: Tensor | None, heads: int
) -> Tensor:
    """y (B, T, H, C / H) by k products of u with itself shifted: faster than a grouped `conv1d` in the layout (B, T, C), and fuses under compile."""
    reach, time = weight.shape[0] - 1, u.shape[1]
    padded = _joined(past, u, reach)
    document = None if reset is None else F.pad(reset.cumsum(1), (reach, 0))
    weight, y = weight.to(u.dtype), bias.to(u.dtype)
    for j in range(reach + 1):
        start = reach - j
        tap = padded[:, start : start + time]
        if document is not None and j:
            tap = tap.masked_fill((document[:, start : start + time] != document[:, reach:])[:, :, None], 0.0)
        y = torch.addcmul(y, tap, weight[j])
    return F.silu(y).unflatten(2, (heads, -1))


@torch.library.custom_op("parashoot::causal_conv", mutates_args=())
def causal_conv(
    u: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, reset: Tensor | None, heads: int
) -> Tensor:
    """y (B, T, H, C / H) by the kernels: sums in float32 from parameters in their own dtype, one rounding to the dtype of u."""
    from ..triton.convolution import run_forward  # Triton is imported where it is used

    return run_forward(u, weight, bias, past, reset).unflatten(2, (heads, -1))


@torch.library.custom_op("parashoot::causal_conv_backward", mutates_args=("du",))
def causal_conv_backward(
    dy: Tensor, u: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, reset: Tensor | None, du: Tensor
) -> tuple[Tensor, Tensor]:
    """(float32 gradients (k + 1, C) of weight and, the last row, bias, dpast or nothing); du (B, T, C or more) takes that of u in its
    first C channels."""
    from ..triton.convolution import run_backward

    return run_backward(dy, u, weight, bias, past, reset, du)


@causal_conv.register_fake
def _(u, weight, bias, past, reset, heads):
    return u.new_empty(*u.shape[:2], heads, u.shape[2] // heads)


@causal_conv_backward.register_fake
def _(dy, u, weight, bias, past, reset, du):
    sums = u.new_empty(weight.shape[0] + 1, u.shape[2], dtype=torch.float32)
    return sums, u.new_empty(0) if past is None else past.new_empty(past.shape)


def _backward(ctx, dy):
    first_derivative_only("CausalConv")
    u, weight, bias, past, reset = ctx.saved_tensors
    du = u.new_empty(u.shape)
    sums, dpast = causal_conv_backward(dy, u, weight, bias, past, reset, du)
    return du, sums[:-1].to(weight.dtype), sums[-1].to(bias.dtype), None if past is None else dpast, None, None


causal_conv.register_autograd(_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs[:-1]))
