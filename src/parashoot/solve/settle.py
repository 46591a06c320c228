"""Whether an iteration on chunks has come to rest, told from how far starts and gradients still move from pass to pass."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def moves(new: Sequence[Tensor], old: Sequence[Tensor]) -> Tensor:
    """How far each chunk's states moved (R,), relative to max(1, |state|). Equal infinities have not, nor have two NaNs."""
    found = []
    for a, b in zip(new, old, strict=True):
        same = (a == b) | (a.isnan() & b.isnan())
        found.append(((a - b).abs() / b.abs().clamp_min(1.0)).masked_fill(same, 0.0).amax(1))
    return torch.stack(found).amax(0)


def grew(new: Sequence[Tensor], old: Sequence[Tensor], moved: Tensor, before: Tensor) -> Tensor:
    """Whether any chunk's start, `new` and `old` (R, H), `moved` (R,) no less than starts it depends on moved `before` (R,) that, however
    little, and by more than its own roundings: it may be a state that grows, among others that forget."""
    size, by = (
        torch.stack([v.abs().amax(1) for v in vs]).amax(0)
        for vs in (old, [a - b for a, b in zip(new, old, strict=True)])
    )
    return ((moved > 0.9 * before) & ~(by <= 16 * torch.finfo(by.dtype).eps * size)).any()


def relative_moves(new: Sequence[Tensor], old: Sequence[Tensor]) -> Tensor:
    """The largest change of a gradient relative to the largest gradient, over all states."""
    pairs = zip(new, old, strict=True)
    return torch.stack(
        [(a - b).abs().max() / a.abs().max().clamp_min(torch.finfo(a.dtype).tiny) for a, b in pairs]
    ).amax()


def read(first: Tensor | None, last: Tensor, steps: int, passes: int, tol: float) -> tuple[float, float, float]:
    """Waits for the device: contraction of a pass (1 if it shrank nothing), steps in which a change of `first` (None: of 1) shrinks to `tol` if it shrank to
    `last` in `steps`, and `last`."""
    a, b = torch.stack([torch.ones_like(last) if first is None else first, last]).tolist()
    if passes > 1 and a <= b and b > 0:
        return 1.0, math.inf, b
    if passes == 1 or not b < a:
        return 0.0, (1.0 if b <= tol else math.inf), b
    least = max(tol, 1e-30)
    shrunk = math.log(max(b, 1e-3 * least) / a)
    return min(math.exp(shrunk / (passes - 1)), 0.9), steps * max(math.log(least / a) / shrunk, 0.0), b


def noise(dtype: torch.dtype) -> float:
    """What roundings of stored numbers move, pass after pass, however much a recurrence forgets."""
    return 4 * torch.finfo(dtype).eps if dtype.itemsize == 2 else 0.0


def is_settled(defect: float, rate: float, tol: float, dtype: torch.dtype) -> bool:
    """Whether what moved by `defect` will move by less than `tol` in all, contracting by `rate` a pass."""
    return defect <= tol * (1 - rate) or (defect <= noise(dtype) and defect * rate <= tol * (1 - rate))


def passes_left(horizon: float, length: int, passes: int) -> float:
    """Passes still to make; at least one."""
    return max(math.ceil(horizon / length) + 1 - passes, 1) if math.isfinite(horizon) else math.inf
