"""The loss of a language model without its logits: cross-entropy and z-loss in pieces of the batch.

For a vocabulary of 50,000 the logits of a batch are many times larger than everything else; here only those of `ROWS` tokens exist
at a time, and their gradient is taken in the same pass.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

ROWS = 4096
IGNORED = -100


def next_token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0, num_items: Tensor | int | None = None
) -> Tensor:
    """1/N sum_t (lse_t - l_t[label_{t+1}] + z lse_t^2), l_t = W h_t, lse_t = logsumexp(l_t), over labels other than -100.

    - `hidden` h (B, T, d), `weight` W (V, d), `labels` (B, T) int64: h_t is scored against the label at t + 1.
    - `num_items` N; None: the number of tokens scored. Without any, the loss is zero.

    Logits in the dtype of h (under autocast in its dtype), the rest in float32. A scalar, differentiable by h and W, once. z-loss:
    Chowdhery et al. 2022 (PaLM).
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    hidden, device = hidden.flatten(0, 1), hidden.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
    by_kernel = hidden.is_cuda and not torch.compiler.is_compiling() and _has_kernel()
    total = _total_by_kernel if by_kernel else _total
    with torch.autocast(device, enabled=False):
        summed = total(hidden.to(dtype), weight, targets, z_loss)
    if num_items is None:
        num_items = (targets != IGNORED).sum().clamp(min=1)
    return summed / num_items


def _total(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _InPieces.apply(hidden, weight, targets, z_loss, wanted)  # type: ignore[return-value]


@functools.cache
def _has_kernel() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _total_by_kernel(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    options: dict[str, Any] = {"lse_square_scale": z_loss, "reduction": "sum", "accum_dtype": torch.float32}
    return LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, **options)(weight.to(hidden.dtype), hidden, targets)


class _InPieces(torch.autograd.Function):
    """The sum over tokens; the gradients are made in the forward pass and only scaled in the backward one."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, wanted: bool) -> Tensor:  # type: ignore[override]
        low = weight.to(hidden.dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=exact)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wanted else None
        for start in range(0, hidden.shape[0], ROWS):
            h, target = hidden[start : start + ROWS], targets[start : start + ROWS]
            scored = target != IGNORED
            index = target.where(scored, 0).unsqueeze(1)
            logits = (h @ low.T).to(exact)
            lse = logits.logsumexp(-1)
            each = lse - logits.gather(1, index).squeeze(1) + z_loss * lse.square()
            total = total + each.where(scored, 0.0).sum()
            if d_hidden is not None and d_weight is not None:
                # d each / d logits = (1 + 2 z lse) softmax - onehot
                scale = (1 + 2 * z_loss * lse).where(scored, 0.0).unsqueeze(1)
                d_logits = (logits - lse.unsqueeze(1)).exp_().mul_(scale)
                d_logits = d_logits.scatter_add_(1, index, -scored.to(exact).unsqueeze(1)).to(h.dtype)
                d_hidden[start : start + ROWS] = d_logits @ low
                d_weight += d_logits.T @ h
        if wanted:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.dtype = weight.dtype
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), (d_weight * grad).to(ctx.dtype), None, None, None
