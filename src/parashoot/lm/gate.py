"""What stands around a recurrence: u of [u, g] convolved before it, g gating and the norm after it.

    v = silu(conv(u)),  n = w * rms_norm(y * silu(g))

Both gradients of [u, g] are written into one tensor, which the product behind it reads as it is: the gate's kernel makes it and
fills its half, the convolution's, which runs later, the other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from .conv import CausalConv, causal_conv, causal_conv_backward
from .parts import RMSNorm, first_derivative_only


class GatedNorm(RMSNorm):
    """w * rms_norm(y * silu(g)), g the last C channels of ug (B, T, 2 C): (B, T, C) -> (B, T, C)."""

    eps: float

    def forward(self, y: Tensor, ug: Tensor, shared: bool = False) -> Tensor:  # type: ignore[override]
        """`shared`: kernels ran in the `HalfConv` that ug came from, which completes its gradient."""
        if shared:
            return _GatedNorm.apply(y, ug, self.weight, self.eps)  # type: ignore[return-value]
        return gated_norm(y, ug, self.weight, self.eps)


def gated_norm(y: Tensor, ug: Tensor, weight: Tensor, eps: float) -> Tensor:
    """n (..., C) of y (..., C), ug (..., 2 C) and weight (C,), in the dtype of y."""
    z = y * F.silu(ug[..., y.shape[-1] :])
    return F.rms_norm(z, weight.shape, weight.to(z.dtype), eps)


class HalfConv(CausalConv):
    """v = silu(conv(u)) of the first half u of ug (B, T, 2 C), and ug for `GatedNorm` and nothing else."""

    def forward(  # type: ignore[override]
        self, ug: Tensor, past: Tensor | None = None, reset: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(v as `CausalConv` gives it, ug, the past after u)."""
        u = ug[..., : self.weight.shape[1]]
        if not self.fused(u):
            v, after = super().forward(u, past, reset)
            return v, ug, after
        v, ug = _Convolved.apply(ug, self.weight, self.bias, past, reset, self.heads)  # type: ignore[misc]
        return v if self.heads > 1 else v.flatten(2), ug, self.after(u, past, reset)


class _Convolved(torch.autograd.Function):
    """`causal_conv` of the first half of ug, and ug, whose gradient comes back with that half still to be written."""

    @staticmethod
    def forward(ctx, ug: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, reset: Tensor | None, heads: int):  # type: ignore[override]
        ctx.save_for_backward(ug, weight, bias, past, reset)
        return causal_conv(ug[..., : weight.shape[1]], weight, bias, past, reset, heads), ug.view_as(ug)

    @staticmethod
    def backward(ctx, dv: Tensor, dug: Tensor):  # type: ignore[override]
        first_derivative_only("CausalConv")
        ug, weight, bias, past, reset = ctx.saved_tensors
        dug = dug.contiguous()
        sums, dpast = causal_conv_backward(dv, ug[..., : weight.shape[1]], weight, bias, past, reset, dug)
        return dug, sums[:-1].to(weight.dtype), sums[-1].to(bias.dtype), None if past is None else dpast, None, None


class _GatedNorm(torch.autograd.Function):
    """`gated_norm` by a kernel each way, of which the second leaves the first half of ug's gradient to `_Convolved`."""

    @staticmethod
    def forward(ctx, y: Tensor, ug: Tensor, weight: Tensor, eps: float) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(y, ug, weight)
        ctx.eps = eps
        return gated_norm_forward(y, ug, weight, eps)

    @staticmethod
    def backward(ctx, dn: Tensor):  # type: ignore[override]
        first_derivative_only("GatedNorm")
        y, ug, weight = ctx.saved_tensors
        dy, dug, dw = gated_norm_backward(dn, y, ug, weight, ctx.eps)
        return dy, dug, dw.to(weight.dtype), None


@torch.library.custom_op("parashoot::gated_norm", mutates_args=())
def gated_norm_forward(y: Tensor, ug: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`gated_norm` in one pass, rounded once."""
    from ..triton.gated_norm import run_forward  # Triton is imported where it is used

    return run_forward(y, ug[..., y.shape[-1] :], weight, eps)


@gated_norm_forward.register_fake
def _(y, ug, weight, eps):
    return y.new_empty(y.shape)


@torch.library.custom_op("parashoot::gated_norm_backward", mutates_args=())
def gated_norm_backward(dn: Tensor, y: Tensor, ug: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """(dy (..., C), the gradient (..., 2 C) of ug, its first half left as it happens to be, float32 gradient (C,) of weight)."""
    from ..triton.gated_norm import run_backward  # Triton is imported where it is used

    make = (
        torch.zeros_like if torch.is_anomaly_enabled() else torch.empty_like
    )  # the detector looks for NaN in both halves
    dug, width = make(ug, memory_format=torch.contiguous_format), y.shape[-1]
    dy, dw = run_backward(dn, y, ug[..., width:], weight, eps, dug[..., width:])
    return dy, dug, dw


@gated_norm_backward.register_fake
def _(dn, y, ug, weight, eps):
    return y.new_empty(y.shape), ug.new_empty(ug.shape), weight.new_empty(weight.shape, dtype=torch.float32)
