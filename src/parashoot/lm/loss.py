"""The loss of a language model without its logits: cross-entropy and z-loss in pieces of the batch.

For a vocabulary of 50,000 the logits of a batch are many times larger than everything else; here only those of `ROWS` tokens exist
at a time, and their gradient is taken in the same pass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .parts import TRITON, working

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
    low = working(hidden)
    wanted = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)
    with torch.autocast(device, enabled=False):
        summed, z_part = _InPieces.apply(low, weight, targets, z_loss, wanted)  # type: ignore[misc]
    if num_items is None:
        num_items = (targets != IGNORED).sum().clamp(min=1)
    return summed / num_items, z_part.detach() / num_items


def token_losses(hidden: Tensor, head: nn.Module, targets: Tensor) -> Tensor:
    """-ln softmax(head(h))[target] for h (B, T, d) and targets (B, T) int64: (B, T) in float32 or better, in pieces of `ROWS` tokens."""
    pieces = zip(hidden.flatten(0, 1).split(ROWS), targets.flatten().split(ROWS), strict=True)
    exact = torch.promote_types(hidden.dtype, torch.float32)
    return torch.cat([F.cross_entropy(head(h).to(exact), t, reduction="none") for h, t in pieces]).view_as(targets)


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
            h = hidden[start : start + ROWS]
            losses, squares, d_logits = _score(h @ low.T, targets[start : start + ROWS], z_loss, wanted)
            total, z_part = total + losses, z_part + squares
            if d_hidden is not None and d_weight is not None:
                d_hidden[start : start + ROWS] = d_logits @ low
                if hidden.is_cuda and exact != hidden.dtype:
                    torch.addmm(d_weight, d_logits.T, h, out_dtype=exact, out=d_weight)  # summed in float32
                else:
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


def _score(logits: Tensor, targets: Tensor, z_loss: float, wanted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over tokens of the loss and of the z-loss in it, and, where `wanted`, the gradient of the former by the logits, in their dtype."""
    if TRITON and logits.is_cuda and logits.dtype != torch.float64 and not torch.compiler.is_compiling():
        from ..triton.cross_entropy import run_score

        return *run_score(logits, targets, z_loss, IGNORED, wanted), logits
    exact = logits.to(torch.promote_types(logits.dtype, torch.float32))
    scored = (targets != IGNORED).unsqueeze(1)
    index = targets.unsqueeze(1).where(scored, 0)
    lse = exact.logsumexp(-1, keepdim=True)
    square = (z_loss * lse.square()).where(scored, 0.0)
    loss = (lse - exact.gather(1, index)).where(scored, 0.0) + square
    # d (lse - logit + z lse^2) / d logits = (1 + 2 z lse) softmax - onehot
    hit = torch.arange(logits.shape[1], device=logits.device) == index
    gradient = (1 + 2 * z_loss * lse) * (exact - lse).exp() - hit.to(exact.dtype)
    return loss.sum(), square.sum(), gradient.where(scored, 0.0).to(logits.dtype)
