"""How far a contestant's result and gradients lie from the fp64 for-loop over its own recurrence, and how far they may."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..diagnostics import BOUNDS, relative_error
from .contest import Entry, Truth

FORWARD_STEPS = 2**14  # steps of a sequence that are compared; the loop is too slow for more
BACKWARD_STEPS = 2**11


@dataclass(frozen=True)
class Agreement:
    """Largest error of y and largest relative error of a gradient (None where not measured); "wrong" if not within the contract."""

    status: str
    error: float
    gradient_error: float | None
    compared_steps: int


def agreement(entry: Entry, time: int, train: bool) -> Agreement:
    """Compare an entry over `time` steps with its truth, by the numerics contract that the library holds itself to."""
    steps = min(FORWARD_STEPS, time)
    truth, dtype = entry.truth(steps), entry.inputs[0].dtype
    with torch.no_grad():
        got = _home(truth.see(entry.run(*entry.inputs)))
    exact, own = forward_truth(truth)
    error = (got - exact).abs()
    absolute, relative, bound = BOUNDS[dtype]
    ok = bool((error <= torch.maximum(absolute + relative * exact.abs(), 2 * own)).all())
    worst = float(error.max()) if bool(error.isfinite().all()) else math.inf
    off, own_off = _gradient_errors(entry, entry.truth(min(BACKWARD_STEPS, steps))) if train else (None, 0.0)
    ok = ok and (off is None or off <= max(bound, 2 * own_off))
    return Agreement("ok" if ok else "wrong", worst, off, steps)


@functools.lru_cache(maxsize=1)
def forward_truth(truth: Truth) -> tuple[Tensor, Tensor]:
    """y of the fp64 loop, and the largest error of the same loop in fp32 (in fp64 storage: zero)."""
    with torch.no_grad():
        exact = _home(truth.run(*(v.double() for v in truth.leaves)))
        if truth.leaves[0].dtype == torch.float64:
            return exact, torch.zeros(())
        return exact, (_home(truth.run(*(v.float() for v in truth.leaves))) - exact).abs().max()


@functools.lru_cache(maxsize=1)
def backward_truth(truth: Truth) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """A random dy for the part, and its gradients through the fp64 and the fp32 loop."""
    found, weights = [], torch.empty(0)
    for dtype in (torch.float64, torch.float64 if truth.leaves[0].dtype == torch.float64 else torch.float32):
        leaves = [v.to(dtype).requires_grad_() for v in truth.leaves]
        with torch.enable_grad():
            y = truth.run(*leaves)
        if not found:
            weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        grads = torch.autograd.grad(y, leaves, weights.to(y), allow_unused=True)
        found.append([_home(torch.zeros_like(v) if g is None else g) for v, g in zip(leaves, grads, strict=True)])
    return weights, found[0], found[1]


def _gradient_errors(entry: Entry, truth: Truth) -> tuple[float | None, float]:
    """Largest relative error over the gradients that can be compared: the contestant's and the fp32 loop's."""
    weights, exact, own = backward_truth(truth)
    y = entry.run(*entry.inputs)
    dy = torch.zeros_like(y)
    part = truth.see(dy)
    part.copy_(weights.to(part))
    got: Sequence[Tensor | None] = truth.pick(entry.gradients(y, entry.inputs, dy))
    seen = [(_home(g), e, o) for g, e, o in zip(got, exact, own, strict=True) if g is not None]
    if not seen:
        return None, 0.0
    errors = [relative_error(g, e) for g, e, _ in seen]
    worst = max(errors) if all(map(math.isfinite, errors)) else math.inf
    return worst, max(relative_error(o, e) for _, e, o in seen)


def _home(v: Tensor) -> Tensor:
    return v.detach().double().cpu()
