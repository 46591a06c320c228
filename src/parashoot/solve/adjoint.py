"""The exact adjoint of the recurrence: gradients by one linear solve, never by differentiating the iterations.

With A_t = d h_t / d h_{t-1} at the solution, and lambda_t the gradient of the loss by h_t:

    lambda_T = dy_T + dh_n,   lambda_t = dy_t + A_{t+1}^T lambda_{t+1},   dh0 = A_1^T lambda_1,
    dx_t = (df/dx_t)^T lambda_t,   dparams = sum over batch and t of (df/dparams)^T lambda_t.

Structured cells: two chunked sweeps with explicit A_t, unclamped (`adjoint`). Cells whose matrices are not formed: the same
chunks, iterated on the gradients that cross their boundaries (`adjoint_by_sweeps`), exact after at most n sweeps like the
forward pass. Shapes as in `shooting.py`; `before` (m, S, B, n, F) are the states entering each step.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from .shooting import NEARER, Steps, rounding

_CACHE = 2**26  # elements of step Jacobians kept between the two sweeps; more are computed again


@dataclass(frozen=True)
class Gradients:
    """dxs (m, G, B, n, F), a gradient for each parameter, dh0 (S, B, F)."""

    xs: Tensor
    params: list[Tensor]
    h0: Tensor


@dataclass(frozen=True)
class Cotangents:
    """What comes in: `dys` (m, S, B, n, F), `dh_n` (S, B, F), and the number `tail` of real steps in the last chunk; the rest
    repeats the last real step and must not contribute."""

    dys: Tensor
    dh_n: Tensor
    tail: int


def adjoint(steps: Steps, before: Tensor, cots: Cotangents) -> Gradients | None:
    """Gradients in two chunked sweeps; None where a chunk's Jacobian product is not finite (then sweep with one chunk)."""
    algebra, n = steps.algebra, before.shape[3]
    windows = steps.windows()
    entries = algebra.slots * (algebra.feature[-1] if algebra.full else 1)
    keep = before.numel() * entries <= _CACHE
    cache: dict[tuple[int, int], Tensor] = {}

    def jacobians(window: tuple[int, int]) -> Tensor:
        if window not in cache:
            found = steps.jacobians(before[slice(*window)], window)
            _identity_on_padding(steps, found, window, cots.tail)
            if not keep:
                return found
            cache[window] = found
        return cache[window]

    beta = torch.zeros_like(before[0])  # gradient by each chunk's end, from later chunks
    beta[:, :, -1] = cots.dh_n
    back = _Backwards(steps, cots)
    if n > 1:
        lam, product = beta, None
        for window in reversed(windows):
            for step, dy, cut in back(window, jacobians(window)):
                lam = _cut(algebra.apply_t(step, lam + dy), cut)
                product = step if product is None else algebra.compose(product, step)
        assert product is not None
        if not bool(torch.isfinite(product).all()):
            return None
        beta[:, :, n - 2] = lam[:, :, n - 1]
        for c in range(n - 2, 0, -1):
            through = _cut(algebra.apply_t(algebra.at(product, c), beta[:, :, c]), back.cuts(c))
            beta[:, :, c - 1] = lam[:, :, c] + through
    carry, gather = beta, _Gather(steps, before, cots)
    for window in reversed(windows):
        lams = []
        for step, dy, cut in back(window, jacobians(window)):
            lams.append(carry + dy)
            carry = _cut(algebra.apply_t(step, lams[-1]), cut)
        gather(window, torch.stack(lams[::-1]))
    return gather.gradients(carry[:, :, 0])


class _Backwards:
    """The steps of a window, last first: their matrices, incoming gradients, and where a reset cuts what passes."""

    def __init__(self, steps: Steps, cots: Cotangents):
        self.steps, self.dys = steps, cots.dys.unbind(0)
        self.resets = None
        if steps.resets is not None:
            real = steps.resets.clone()
            real[cots.tail :, :, -1] = False  # padding repeats the last real step, reset included; nothing is cut there
            self.resets = steps.at(real)

    def __call__(self, window: tuple[int, int], jacobians: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor | None]]:
        matrices = self.steps.split(jacobians)
        for t in reversed(range(*window)):
            yield matrices[t - window[0]], self.dys[t], None if self.resets is None else self.resets[t]

    def cuts(self, chunk: int) -> Tensor | None:
        """Where any reset cuts the chunk."""
        return None if self.resets is None else self.resets[:, :, chunk].any(0)


def _cut(v: Tensor, where: Tensor | None) -> Tensor:
    """A select, not a product with a zero Jacobian: it stops NaN too."""
    return v if where is None else v.masked_fill(where, 0.0)


def adjoint_by_sweeps(
    steps: Steps, before: Tensor, cots: Cotangents, tol: float, limit: int | None = None
) -> Gradients | None:
    """Gradients by iterating on the boundary gradients, no Jacobian formed; at most n sweeps, until those differ by `tol` and by ever less.

    Where a sweep brings chunks hardly nearer to each other, the rest run one after another; with a `limit`, None then and after so many sweeps.
    """
    sweeps, n, last = 0, before.shape[3], torch.zeros_like(before[0])
    beta = torch.zeros_like(before[0])
    beta[:, :, -1] = cots.dh_n
    lams = torch.empty_like(before)
    alpha = torch.empty_like(beta)
    live = n  # chunks from `live` on are exact
    while True:
        alpha[:, :, :live] = _pull_chunks(steps, before, cots, beta, lams, 0, live)
        incoming = alpha[:, :, 1:live]
        defect = incoming - beta[:, :, : live - 1]
        unchanged = (defect == 0) | (incoming.isnan() & beta[:, :, : live - 1].isnan())
        exact = unchanged.transpose(0, 2).flatten(1).all(1).flip(0)
        live_next = live - 1 - int(exact.long().cumprod(0).sum())
        if live_next <= 0:
            break
        scale = alpha.nan_to_num(0.0, 0.0, 0.0).abs().amax((0, *range(2, alpha.dim())), keepdim=True)
        outside = ~((defect.abs() <= tol * scale) | unchanged)
        apart = torch.where(unchanged, 0.0, defect.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny))
        now = torch.zeros_like(last)  # by the end of each chunk
        now[:, :, : live - 1] = apart.nan_to_num(math.inf)
        moved = (now[:, :, :-1] > NEARER * last[:, :, 1:])[:, :, : live - 1] & ~rounding(defect, incoming)
        if not bool(outside.any() | moved.any()):
            break
        stuck, last, sweeps = sweeps > 0 and bool(now.max() > NEARER * last.max()), now, sweeps + 1
        if limit is not None and (stuck or sweeps == limit):
            return None
        if stuck:
            for c in reversed(range(live_next)):
                beta[:, :, c] = alpha[:, :, c + 1]
                alpha[:, :, c : c + 1] = _pull_chunks(steps, before, cots, beta, lams, c, c + 1)
            break
        beta[:, :, : live - 1] = incoming
        live = live_next
    gather = _Gather(steps, before, cots)
    for window in steps.windows():
        gather(window, lams[slice(*window)])
    return gather.gradients(alpha[:, :, 0])


def _pull_chunks(
    steps: Steps, before: Tensor, cots: Cotangents, beta: Tensor, lams: Tensor, first: int, live: int
) -> Tensor:
    """Pull `beta` back through the chunks from `first` to `live`, writing lambda for each step; the gradients by their starts."""
    chunks = slice(first, live)
    lam, last = beta[:, :, chunks], before.shape[3] == live
    resets = None if steps.resets is None else steps.at(steps.resets)
    for t in reversed(range(steps.length)):
        lam = lam + cots.dys[t, :, :, chunks]
        lams[t, :, :, chunks] = lam
        pulled = steps.trace.pull(
            before[t, :, :, chunks].unbind(0), steps.xs[t, :, :, chunks].unbind(0), steps.params, lam.unbind(0)
        )
        new = torch.stack(pulled)
        if resets is not None:
            new = new.masked_fill(resets[t, :, chunks], 0.0)
        if last and t >= cots.tail:
            new[:, :, -1] = lam[:, :, -1]
        lam = new
    return lam


def _identity_on_padding(steps: Steps, jacobians: Tensor, window: tuple[int, int], tail: int) -> None:
    """Steps after the last real one hand gradients through unchanged."""
    a, b = max(window[0], tail) - window[0], window[1] - window[0]
    if a >= b:
        return
    algebra = steps.algebra
    if algebra.full:
        jacobians[a:b, :, -1] = algebra.identity((b - a, jacobians.shape[1]), jacobians)
    else:
        jacobians[:, :, a:b, :, -1] = algebra.identity((b - a, jacobians.shape[3]), jacobians)


class _Gather:
    """Turns lambdas into gradients of inputs and parameters, window by window."""

    def __init__(self, steps: Steps, before: Tensor, cots: Cotangents):
        self.steps, self.before, self.tail = steps, before, cots.tail
        self.xs: list[tuple[int, Tensor]] = []
        self.params: list[Tensor] | None = None

    def __call__(self, window: tuple[int, int], lams: Tensor) -> None:
        a, b = window
        if b > self.tail:
            lams = lams.clone() if lams._is_view() else lams
            lams[max(self.tail - a, 0) :, :, :, -1] = 0.0
        steps = self.steps
        d_xs, d_params = steps.trace.vjp(
            self.before[a:b].unbind(1), steps.xs[a:b].unbind(1), steps.params, lams.unbind(1)
        )
        self.xs.append((a, torch.stack(d_xs, 1)))
        self.params = d_params if self.params is None else [u + v for u, v in zip(self.params, d_params, strict=True)]

    def gradients(self, h0: Tensor) -> Gradients:
        parts = [d for _, d in sorted(self.xs, key=lambda part: part[0])]
        assert self.params is not None
        return Gradients(parts[0] if len(parts) == 1 else torch.cat(parts), self.params, h0)
