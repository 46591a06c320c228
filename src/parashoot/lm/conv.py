"""A causal depthwise convolution that continues from its past and never reaches across a reset."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class CausalConv(nn.Module):
    """y_t = b + sum_{j < k} w_j u_{t-j}, for each channel by itself; the sum ends where a new sequence began.

    Written as k shifted products, which is faster than a grouped `conv1d` in the layout (B, T, C) and fuses under compile.
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(kernel, channels))
        self.bias = nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights uniform with variance 1/(3k), as `nn.Conv1d` draws them; bias zero."""
        nn.init.uniform_(self.weight, -(self.weight.shape[0] ** -0.5), self.weight.shape[0] ** -0.5)
        nn.init.zeros_(self.bias)

    def forward(self, u: Tensor, past: Tensor | None = None, reset: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u (B, T, C), past inputs (B, k - 1, C) or None for zeros, reset (B, T) bool -> (y (B, T, C), past after u).

        In the returned past, inputs from before the last reset are zero, so it needs no mask of its own.
        """
        reach, time = self.weight.shape[0] - 1, u.shape[1]
        padded = F.pad(u, (0, 0, reach, 0)) if past is None else torch.cat([past.to(u.dtype), u], 1)
        document = None if reset is None else F.pad(reset.cumsum(1), (reach, 0))
        weight, y = self.weight.to(u.dtype), self.bias.to(u.dtype)
        for j in range(reach + 1):
            start = reach - j
            tap = padded[:, start : start + time]
            if document is not None and j:
                tap = tap.masked_fill((document[:, start : start + time] != document[:, reach:])[:, :, None], 0.0)
            y = torch.addcmul(y, tap, weight[j])
        after = padded[:, time:]
        if document is not None:
            return y, after.masked_fill((document[:, time:] != document[:, -1:])[:, :, None], 0.0)
        return y, after.clone()
