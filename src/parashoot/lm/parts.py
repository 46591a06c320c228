"""What blocks and their mixers are made of: the norm, the residual stream and the linear layer that writes to it."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import GradientError

TRITON = importlib.util.find_spec("triton") is not None
STORED = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels load and store; they compute in float32


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * w, with w in the dtype of x, for which PyTorch has a fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


def first_derivative_only(module: str) -> None:
    """`GradientError` in a backward pass that is itself to be differentiated."""
    if torch.is_grad_enabled():
        raise GradientError(
            f"{module} was to be differentiated twice (create_graph=True); its kernels provide first derivatives only. "
            "Run it on a CPU or in float64."
        )


def working(x: Tensor) -> Tensor:
    """x in the dtype of matrix products: that of autocast where it is on, else its own. The residual stream is kept in it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


class ResidualLinear(nn.Linear):
    """A linear layer that writes to the residual stream, drawn narrower the more of them there are."""
