"""Where time goes: from the order of a caller's tensors to chunks side by side, and back."""

from __future__ import annotations

import torch
from torch import Tensor

from ..plan import compute_dtype


class Layout:
    """Between (B, T, K, C) and chunks (m, K, B, n, F), flipped in time for a reverse scan; the last chunk is filled up by
    repeating the last real step."""

    def __init__(self, x: Tensor, length: int, feature: tuple[int, ...], reverse: bool):
        self.batch, self.time, _, self.channels = x.shape
        self.length, self.feature, self.reverse = length, feature, reverse
        self.chunks = -(-self.time // length)
        self.tail = self.time - (self.chunks - 1) * length
        self.dtype = compute_dtype(x.dtype)

    def chunk(self, v: Tensor, pad_zero: bool = False) -> Tensor:
        v = v.flip(1) if self.reverse else v
        shape = (self.length, v.shape[2], self.batch, self.chunks, self.channels)
        if self.chunks * self.length == self.time:
            out = v.unflatten(1, (self.chunks, self.length)).permute(2, 3, 0, 1, 4).to(self.dtype).contiguous()
        else:
            out = torch.empty(shape, dtype=self.dtype, device=v.device)
            whole = (self.chunks - 1) * self.length
            if self.chunks > 1:
                out[:, :, :, :-1] = v[:, :whole].unflatten(1, (self.chunks - 1, self.length)).permute(2, 3, 0, 1, 4)
            out[: self.tail, :, :, -1] = v[:, whole:].permute(1, 2, 0, 3)
            out[self.tail :, :, :, -1] = 0.0 if pad_zero else v[:, -1].transpose(0, 1)
        return out.view(*shape[:4], *self.feature)

    def unchunk(self, v: Tensor, dtype: torch.dtype) -> Tensor:
        whole = (self.chunks - 1) * self.length
        v = v.flatten(4) if len(self.feature) > 1 else v
        out = torch.empty(self.batch, self.time, v.shape[1], self.channels, dtype=dtype, device=v.device)
        if self.chunks > 1:
            out[:, :whole].unflatten(1, (self.chunks - 1, self.length)).copy_(v[:, :, :, :-1].permute(2, 3, 0, 1, 4))
        out[:, whole:] = v[: self.tail, :, :, -1].permute(2, 0, 1, 3)
        return out.flip(1) if self.reverse else out

    def state(self, h: Tensor) -> Tensor:
        """(B, S, C) -> (S, B, F)."""
        return h.movedim(1, 0).to(self.dtype).reshape(h.shape[1], self.batch, *self.feature)

    def mask(self, reset: Tensor) -> Tensor:
        """(B, T) -> (m, B, n). In a reverse scan the boundary before t is crossed on the way from t to t - 1."""
        if self.reverse:
            reset = torch.cat(
                [reset[:, 1:], torch.zeros_like(reset[:, :1])], 1
            )  # flipped below: entering t is leaving t + 1
        v = reset.flip(1) if self.reverse else reset
        pad = self.chunks * self.length - self.time
        v = torch.cat([v, v[:, -1:].expand(-1, pad)], 1) if pad else v
        return v.view(self.batch, self.chunks, self.length).permute(2, 0, 1).contiguous()
