"""Multiple-shooting Newton in PyTorch: the forward pass, on any device and for every structure.

Time is cut into n chunks of m steps. Unknown are the states s_c that enter the chunks; s_0 = h0 is known. One iteration:

1. sweep: run the true step through all chunks at once, from s_c to e_c;
2. defects d_c = e_c - s_{c+1}; chunk Jacobians J_c = d e_c / d s_c, only when the defects are not within tolerance;
3. update s_{c+1} <- e_c + J_c delta_c, where delta_0 = 0 and delta_{c+1} = J_c delta_c + d_c (a scan, `linear.corrections`).

Finite termination: delta is exactly zero as long as all earlier defects are, so the first chunk whose start was not yet right
gets it from the exact end before it, whatever the Jacobians were. Such chunks are frozen, not run again: at least one more
each iteration, so n sweeps give the loop's answer for any step and any finite Jacobian, in any rounding.

Shapes here: xs (m, G, B, n, F), states (S, B, n, F), trajectory ys (m, S, B, n, F), resets (m, B, n); F = (C,) or (H, width).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ..cell import Cell
from ..errors import ConvergenceError
from ..trace import Trace
from .linear import Algebra, corrections, finite_or_zero, guard

NEARER = 0.25  # a sweep without Jacobians that leaves more than this of the largest defect says that the cell does not forget


@dataclass(frozen=True)
class Steps:
    """A step and what it runs on: `cell`, its `trace`, inputs, parameters, resets, and how many elements to linearize at once."""

    cell: Cell
    trace: Trace
    algebra: Algebra
    xs: Tensor
    params: Sequence[Tensor]
    resets: Tensor | None
    window: int

    @property
    def length(self) -> int:
        return self.xs.shape[0]

    def windows(self) -> list[tuple[int, int]]:
        """The chunk's steps cut so that one window holds about `window` elements of a state."""
        width = max(1, min(self.length, self.window // max(1, self.xs[0, 0].numel())))
        return [(a, min(a + width, self.length)) for a in range(0, self.length, width)]

    def at(self, resets: Tensor) -> Tensor:
        """Resets, shaped to select among states of the same axes."""
        return resets.view(*resets.shape, *[1] * len(self.algebra.feature))

    def part(self, chunks: slice) -> Steps:
        """The steps of some chunks."""
        resets = None if self.resets is None else self.resets[:, :, chunks]
        return replace(self, xs=self.xs[:, :, :, chunks], resets=resets)

    def jacobians(self, previous: Tensor, window: tuple[int, int]) -> Tensor:
        """Step Jacobians over a window of steps, from the states (w, S, B, n, F) before each; zero across a reset."""
        a, b = window
        out = self.trace.jacobian(previous.unbind(1), self.xs[a:b].unbind(1), self.params)
        if self.resets is None:
            return out
        resets = self.resets[a:b]
        return out.masked_fill(resets[..., None, None, None] if self.algebra.full else self.at(resets), 0.0)

    def split(self, jacobians: Tensor) -> Sequence[Tensor]:
        """The matrices of each step of a window."""
        return jacobians.unbind(0 if self.algebra.full else 2)


def sweep(steps: Steps, start: Tensor, ys: Tensor) -> None:
    """Run the step through all chunks from `start` (S, B, n, F), writing every state into `ys` (m, S, B, n, F).

    Steps with matrices see rows, (B n, F), as they were traced: they may count their axes from the front.
    """
    gates, slots, lead, feature = steps.xs.shape[1], ys.shape[1], ys.shape[2:4], ys.shape[4:]
    rows = (lambda v, at: v.flatten(at, at + 1)) if steps.algebra.full else (lambda v, at: v)
    inputs, outputs = rows(steps.xs, 2).flatten(0, 1).unbind(0), ys.flatten(0, 1).unbind(0)
    new_states, params, resets = steps.cell.new_states, steps.params, steps.resets
    blocked = None if resets is None else rows(steps.at(resets), 1).unbind(0)
    state: Sequence[Tensor] = rows(start, 1).unbind(0)
    for t in range(steps.length):
        if blocked is not None:
            state = [v.masked_fill(blocked[t], 0.0) for v in state]
        state = new_states(state, inputs[t * gates : (t + 1) * gates], params)
        for i, v in enumerate(state):
            outputs[t * slots + i].copy_(
                v.expand(lead.numel(), *feature).unflatten(0, lead) if steps.algebra.full else v
            )


def states_before(ys: Tensor, start: Tensor, window: tuple[int, int], resets: Tensor | None) -> Tensor:
    """The state entering each step of a window, zero across a reset: (w, S, B, n, F)."""
    a, b = window
    before = ys[a - 1 : b - 1] if a else torch.cat([start[None], ys[: b - 1]])
    return before if resets is None else before.masked_fill(resets[a:b, None], 0.0)


def chunk_jacobians(steps: Steps, start: Tensor, ys: Tensor, diagonal: bool) -> Tensor:
    """J_c = A_m ... A_1 of every chunk along the trajectory `ys`, guarded."""
    algebra, product = steps.algebra, None
    resets = None if steps.resets is None else steps.at(steps.resets)
    for window in steps.windows():
        jacobians = steps.jacobians(states_before(ys, start, window, resets), window)
        if diagonal:
            jacobians = algebra.diagonal(jacobians)
        for step in steps.split(jacobians):
            product = step if product is None else algebra.compose(step, product)
    assert product is not None
    return guard(product)


@dataclass(frozen=True)
class Outcome:
    """The trajectory (m, S, B, n, F), sweeps until each sequence was within tolerance (B,), and the final defect."""

    ys: Tensor
    iterations: Tensor
    defect: float


def shoot(
    steps: Steps, h0: Tensor, jacobian: str, tol: float, max_iters: int | None, lazy: float | None, patience: int | None = None
) -> Outcome:  # fmt: skip
    """Solve h_t = f(h_{t-1}, x_t) for all t from `h0` (S, B, F).

    Stops when every defect and every predicted correction is within `tol` of max(1, |state|), or roundings keep both from it
    (`_rounded`), or when all is exact. Where no correction is predicted that can be relied on (no Jacobians, their diagonal alone, or a step
    that compares its state, whose derivative is zero where chunks begin at zero) a sweep has to shrink the defects as well, each to
    `NEARER` of that before it. With a tolerance `lazy`, the first update is made without Jacobians, and they are formed only if the defects
    after it exceed that tolerance or have not shrunk. After `patience` sweeps, or one without Jacobians that brought chunks hardly nearer to each other, those that are not exact
    yet run one after another; `patience` None: never. Raises `ConvergenceError` if
    `max_iters` sweeps were not enough.
    """
    m, _, batch, n = steps.xs.shape[:4]
    ys = steps.xs.new_empty(m, h0.shape[0], *steps.xs.shape[2:])
    start = torch.zeros_like(ys[0])
    start[:, :, 0] = h0
    if n == 1:
        sweep(steps, start, ys)
        return Outcome(ys, torch.ones(1, dtype=torch.float64), 0.0)
    iterations = torch.ones(batch, dtype=torch.float64, device=h0.device)
    first, base, chunk_maps = 0, 0, None  # chunks before `first` are exact; chunk_maps are those of chunks from `base`
    sweeps, largest, before = 0, torch.full_like(iterations, math.inf, dtype=ys.dtype), torch.zeros_like(start)
    blind = jacobian != "exact" or steps.trace.kinked
    while True:
        live = steps.part(slice(first, None))
        sweep(live, start[:, :, first:], ys[:, :, :, first:])
        sweeps += 1
        if first == n - 1:
            return Outcome(ys, iterations, 0.0)
        ends, starts = ys[-1, :, :, first : n - 1], start[:, :, first + 1 :]
        defect = _difference(ends, starts)
        exact = (defect == 0).transpose(0, 2).flatten(1).all(1)
        first_next = first + 1 + int(exact.long().cumprod(0).sum())
        if first_next >= n:
            return Outcome(ys, iterations, 0.0)
        size = torch.where(torch.isfinite(ends), ends.abs().clamp_min(1.0), 1.0)
        bare = jacobian == "zero" or (lazy is not None and sweeps <= 2 and chunk_maps is None)
        allowed = size * (lazy if bare and lazy is not None else tol)
        outside = ~(defect.abs() <= allowed)
        within = not bool(outside.any())
        stuck, rested = False, within
        if bare or blind:
            # A small defect says how wrong a result is only if chunks shrink what their starts are wrong by.
            now = torch.zeros_like(start)
            now[:, :, first + 1 :] = (defect.abs() / size).nan_to_num(math.inf)
            nearer = now[:, :, first + 1 :] <= NEARER * before[:, :, first : n - 1]
            rested = within and bool((nearer | rounding(defect, ends)).all())
            waits = jacobian == "zero" and patience is not None and sweeps > 1
            stuck = waits and bool(now.max() > NEARER * before.max())
            before, outside = now, outside | ((defect != 0) & (not rested))
        if bare and (rested or jacobian == "zero" or sweeps == 1):
            correction = torch.zeros_like(ends)
        else:
            if chunk_maps is None or not within:
                chunk_maps, base = (
                    chunk_jacobians(live, start[:, :, first:], ys[:, :, :, first:], jacobian == "diagonal"),
                    first,
                )
            maps = steps.algebra.at(chunk_maps, slice(first - base, None))
            correction = corrections(steps.algebra, maps, finite_or_zero(defect))
            outside = outside | ~(correction.abs() <= allowed)
        unsolved = outside.transpose(0, 1).flatten(1).any(1)
        if not (bare or blind):
            unsolved &= ~_rounded(defect, correction, size, largest, m)
        if not bool(unsolved.any()):
            return Outcome(ys, iterations, float(defect.abs().max()))
        iterations = torch.where(unsolved, sweeps + 1.0, iterations)
        if sweeps == max_iters:
            raise ConvergenceError(sweeps, float(defect.abs().max()), tol, n)
        if sweeps == patience or stuck:
            for c in range(first_next, n):
                start[:, :, c] = ys[-1, :, :, c - 1]
                sweep(steps.part(slice(c, c + 1)), start[:, :, c : c + 1], ys[:, :, :, c : c + 1])
            return Outcome(ys, iterations, 0.0)
        start[:, :, first + 1 :] = ends + correction
        first = first_next


def rounding(defect: Tensor, ends: Tensor) -> Tensor:
    """Where defects are roundings of the very number, which no sweep lowers."""
    return defect.abs() <= 16 * torch.finfo(defect.dtype).eps * ends.abs()


def _rounded(defect: Tensor, correction: Tensor, size: Tensor, largest: Tensor, m: int) -> Tensor:
    """Sequences (B,) of which the defects are those of m rounded steps, after a Newton sweep that has not halved the `largest` of them,
    and the corrections what a random sum of n makes: no sweep but the last lowers them in a cell that neither forgets nor amplifies."""
    by_sequence = lambda v: v.transpose(0, 1).flatten(1).amax(1)
    now, sum_of = by_sequence(defect.abs() / size), by_sequence(correction.abs() / size)
    least = 8 * torch.finfo(defect.dtype).eps * math.sqrt(m)
    stands = (now >= 0.5 * largest) & (now <= least)
    largest.copy_(now)
    return stands & (sum_of <= 2 * math.sqrt(defect.shape[2]) * now)


def _difference(ends: Tensor, starts: Tensor) -> Tensor:
    """e - s, zero where both are the same infinity or both NaN."""
    same = (ends == starts) | (ends.isnan() & starts.isnan())
    return torch.where(same, 0.0, ends - starts)
