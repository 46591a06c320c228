"""The loss of a language model without its logits: cross-entropy and z-loss in pieces of the batch.

For a vocabulary of 50,000 the logits of a batch are many times larger than everything else; here only those of `ROWS` tokens exist
at a time, and their gradient is taken in the same pass.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import working

ROWS = 4096
IGNORED = -100


def next_token_loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, *, z_loss: float = 0.0, num_items: Tensor | int | None = None
) -> tuple[Tensor, Tensor]:
    """1/N sum_t (lse_t - l_t[label_{t+1}] + z lse_t^2), l_t = W h_t, lse_t = logsumexp(l_t), over labels other than -100.

    - `hidden` h (B, T, d), `weight` W (V, d), `labels` (B, T) int64: h_t is scored against the label at t + 1.
    - `num_items` N; None: the number of tokens scored. Without any, the loss is zero.

    Logits in the dtype of h (under autocast in its dtype), the rest in float32. Returns two scalars: the loss, differentiable by h
    and W, once; and the z-loss in it, without gradient. z-loss: Chowdhery et al. 2022 (PaLM).
    """
    targets = F.pad(labels[:, 1:], (0, 1), value=IGNORED).flatten()
    hidden, device = hidden.flatten(0, 1), hidden.device.type
    by_kernel = hidden.is_cuda and not torch.compiler.is_compiling() and _has_kernel()
    total = _total_by_kernel if by_kernel else _total
    low = working(hidden)
    with torch.autocast(device, enabled=False):
        summed, z_part = total(low, weight, targets, z_loss)
    if num_items is None:
        num_items = (targets != IGNORED).sum().clamp(min=1)
    return summed / num_items, z_part.detach() / num_items


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """-ln softmax(head(h))[target] for h (B, T, d) and targets (B, T) int64: (B, T) in float32 or better, in pieces of `ROWS` tokens."""
    pieces = zip(hidden.flatten(0, 1).split(ROWS), targets.flatten().split(ROWS), strict=True)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    return torch.cat([F.cross_entropy(head(h).to(exact), t, reduction="none") for h, t in pieces]).view_as(targets)


def _total(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    return _InPieces.apply(hidden, weight, targets, z_loss, wanted)  # type: ignore[return-value]


@functools.cache
def _has_kernel() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _total_by_kernel(hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> tuple[Tensor, Tensor]:
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # type: ignore[import-not-found]

    options: Any = {"lse_square_scale": z_loss, "reduction": "sum", "return_z_loss": True, "accum_dtype": torch.float32}
    found = LigerFusedLinearCrossEntropyLoss(ignore_index=IGNORED, **options)(weight.to(hidden.dtype), hidden, targets)
    return found.loss, found.z_loss


class _InPieces(torch.autograd.Function):
    """The sums over tokens; the gradients are made in the forward pass and only scaled in the backward one."""

    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float, wanted: bool):  # type: ignore[override]
        low = weight.to(hidden.dtype)
        exact = torch.promote_types(hidden.dtype, torch.float32)
        total = z_part = hidden.new_zeros((), dtype=exact)
        d_hidden = torch.empty_like(hidden) if wanted else None
        d_weight = torch.zeros_like(weight, dtype=exact) if wanted else None
        for start in range(0, hidden.shape[0], ROWS):
            h, target = hidden[start : start + ROWS], targets[start : start + ROWS]
            scored = target != IGNORED
            index = target.where(scored, 0).unsqueeze(1)
            logits = (h @ low.T).to(exact)
            lse = logits.logsumexp(-1)
            square = z_loss * lse.square()
            z_part = z_part + square.where(scored, 0.0).sum()
            total = total + (lse - logits.gather(1, index).squeeze(1) + square).where(scored, 0.0).sum()
            if d_hidden is not None and d_weight is not None:
                # d (lse - logit + z lse^2) / d logits = (1 + 2 z lse) softmax - onehot
                scale = (1 + 2 * z_loss * lse).where(scored, 0.0).unsqueeze(1)
                d_logits = (logits - lse.unsqueeze(1)).exp_().mul_(scale)
                d_logits = d_logits.scatter_add_(1, index, -scored.to(exact).unsqueeze(1)).to(h.dtype)
                d_hidden[start : start + ROWS] = d_logits @ low
                d_weight += d_logits.T @ h
        if wanted:
            ctx.save_for_backward(d_hidden, d_weight)
            ctx.dtype = weight.dtype
        ctx.mark_non_differentiable(z_part)
        return total, z_part

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad: Tensor, _: Tensor):  # type: ignore[override]
        d_hidden, d_weight = ctx.saved_tensors
        return d_hidden * grad.to(d_hidden.dtype), (d_weight * grad).to(ctx.dtype), None, None, None
