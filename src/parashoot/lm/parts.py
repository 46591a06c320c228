"""What blocks and their mixers are made of: the norm, and the linear layer that writes to the residual stream."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class RMSNorm(nn.RMSNorm):
    """x / sqrt(mean(x^2) + eps) * w, with w in the dtype of x, for which PyTorch has a fused kernel."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)


class ResidualLinear(nn.Linear):
    """A linear layer that writes to the residual stream, drawn narrower the more of them there are."""
