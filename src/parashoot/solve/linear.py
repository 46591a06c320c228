"""Affine maps v -> A v + b over state vectors, and their scan: the linear algebra of both passes.

State vectors are (S, B, ..., F). Matrices come in two layouts, told apart by the number of feature axes they serve:

- slots (channelwise): (S, S, B, ..., C), an S x S matrix for each channel;
- full (headwise, dense): (B, ..., H, K, K), K = S n, a matrix for each head (H = 1, n = C for a dense cell).

`compose(A, P)` is A P, `apply(A, v)` is A v, `apply_t(A, v)` is A^T v.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

# Jacobian products are kept inside +-LIMIT[dtype]: large enough never to bind on a solvable problem, small enough that
# a product of two, times a defect, stays finite.
LIMIT = {torch.float32: 1e12, torch.float64: 1e100}


@dataclass(frozen=True)
class Algebra:
    """The operations for one structure: `slots` S, `feature` (C,) or (H, n), `full` matrices or one per channel."""

    slots: int
    feature: tuple[int, ...]
    full: bool

    def identity(self, lead: tuple[int, ...], like: Tensor) -> Tensor:
        """The identity matrices over the axes `lead` (batch, chunks, ...)."""
        if self.full:
            k = self.slots * self.feature[-1]
            heads = self.feature[0] if len(self.feature) == 2 else 1
            return torch.eye(k, dtype=like.dtype, device=like.device).expand(*lead, heads, k, k).clone()
        eye = torch.eye(self.slots, dtype=like.dtype, device=like.device)
        return (
            eye.view(self.slots, self.slots, *[1] * (len(lead) + 1))
            .expand(self.slots, self.slots, *lead, *self.feature)
            .clone()
        )

    def compose(self, a: Tensor, p: Tensor) -> Tensor:
        """A P."""
        if self.full:
            return a @ p
        if self.slots == 1:
            return a * p
        out = a[:, :1] * p[:1]
        for k in range(1, self.slots):
            out = torch.addcmul(out, a[:, k : k + 1], p[k : k + 1])
        return out

    def apply(self, a: Tensor, v: Tensor) -> Tensor:
        """A v."""
        if self.full:
            return self._from_columns(a @ self._columns(v), v)
        if self.slots == 1:
            return a[0] * v
        out = a[:, 0] * v[0]
        for k in range(1, self.slots):
            out = torch.addcmul(out, a[:, k], v[k])
        return out

    def apply_t(self, a: Tensor, v: Tensor) -> Tensor:
        """A^T v."""
        if self.full:
            return self._from_columns(a.mT @ self._columns(v), v)
        if self.slots == 1:
            return a[0] * v
        out = a[0] * v[0]
        for k in range(1, self.slots):
            out = torch.addcmul(out, a[k], v[k])
        return out

    def _columns(self, v: Tensor) -> Tensor:
        """(S, R..., F) -> (R..., H, K, 1)."""
        v = v if len(self.feature) == 2 else v.unsqueeze(-2)
        return v.movedim(0, -2).flatten(-2).unsqueeze(-1)

    def _from_columns(self, columns: Tensor, like: Tensor) -> Tensor:
        v = columns.squeeze(-1).unflatten(-1, (self.slots, self.feature[-1])).movedim(-2, 0)
        return v.reshape(like.shape)

    def diagonal(self, a: Tensor) -> Tensor:
        """A with its off-diagonal entries set to zero."""
        if self.full:
            return torch.diag_embed(a.diagonal(dim1=-2, dim2=-1))
        eye = torch.eye(self.slots, dtype=torch.bool, device=a.device)
        return a.where(eye.view(self.slots, self.slots, *[1] * (a.dim() - 2)), 0.0)

    def at(self, a: Tensor, chunk: int | slice) -> Tensor:
        """The matrices of one chunk or a range of chunks; chunks are the axis after the batch."""
        return a[:, chunk] if self.full else a[:, :, :, chunk]


def guard(a: Tensor) -> Tensor:
    """NaN becomes 0 and large entries are clamped, so that matrix products stay finite."""
    limit = LIMIT[a.dtype]
    return a.nan_to_num(nan=0.0).clamp_(-limit, limit)


def finite_or_zero(v: Tensor) -> Tensor:
    """Non-finite entries become 0: a correction that cannot be trusted is dropped."""
    return torch.where(torch.isfinite(v), v, 0.0)


def corrections(algebra: Algebra, a: Tensor, defects: Tensor, block: int = 64) -> Tensor:
    """A_c delta_c for every chunk c, where delta_0 = 0 and delta_{c+1} = A_c delta_c + defect_c.

    `a`: guarded chunk Jacobians of chunks 0..n-1 over the axis after the batch; `defects` (S, B, n-1, F), finite. Returns
    (S, B, n-1, F). Zero defects up to chunk c give corrections of exactly zero up to chunk c + 1. More than `block` chunks are
    scanned in two levels, so Newton at chunk length 1 costs about 2 sqrt(T) dependent steps instead of T.
    """
    n = defects.shape[2] + 1
    if n <= block:
        return _corrections_in_order(algebra, a, defects, torch.zeros_like(defects[:, :, 0]))
    m = max(2, round(n**0.5))
    groups = -(-(n - 1) // m)
    pad = groups * m - (n - 1)
    if pad:
        defects = torch.nn.functional.pad(defects, (0, 0) * len(algebra.feature) + (0, pad))
        last = algebra.at(a, slice(n - 2, n - 1))
        axis = 1 if algebra.full else 3
        a = torch.cat([algebra.at(a, slice(0, n - 1)), *[last] * pad], axis)
    axis = 1 if algebra.full else 3
    a = (a if pad else algebra.at(a, slice(0, n - 1))).unflatten(axis, (groups, m))
    d = defects.unflatten(2, (groups, m))
    take = (lambda j: a[:, :, j]) if algebra.full else (lambda j: a[:, :, :, :, j])
    product, local = None, torch.zeros_like(d[:, :, :, 0])
    for j in range(m):
        step = take(j)
        product = step if product is None else guard(algebra.compose(step, product))
        local = finite_or_zero(algebra.apply(step, local)) + d[:, :, :, j]
    assert product is not None
    carry = torch.zeros_like(local)
    delta = torch.zeros_like(local[:, :, 0])
    for g in range(groups):
        carry[:, :, g] = delta
        delta = finite_or_zero(algebra.apply(algebra.at(product, g), delta)) + local[:, :, g]
    out, delta = torch.empty_like(d), carry
    for j in range(m):
        out[:, :, :, j] = finite_or_zero(algebra.apply(take(j), delta))
        delta = out[:, :, :, j] + d[:, :, :, j]
    return out.flatten(2, 3)[:, :, : n - 1]


def _corrections_in_order(algebra: Algebra, a: Tensor, defects: Tensor, delta: Tensor) -> Tensor:
    out = torch.empty_like(defects)
    for c in range(defects.shape[2]):
        out[:, :, c] = finite_or_zero(algebra.apply(algebra.at(a, c), delta))
        delta = out[:, :, c] + defects[:, :, c]
    return out
