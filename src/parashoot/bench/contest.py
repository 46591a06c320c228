"""Who takes part: a contestant enters a case with a way to run a recurrence, and is judged by the fp64 loop over the same."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..diagnostics import BOUNDS, relative_error
from ..plan import compute_dtype
from .cases import Case

SEQUENCES, STEPS, CHANNELS = 2, 2**12, 64  # the part of a result that is compared: the loop is too slow for more


@dataclass(frozen=True, eq=False)
class Truth:
    """A recurrence as a for-loop, over a part of the problem that alone decides the same part of the result.

    `loop(*pick(tensors)) -> y` is differentiable, in whichever dtype the `tensors` (inputs and weights) come; `see(y)` is a view
    of that part of a contestant's y, `pick(grads)` of its gradients.
    """

    loop: Callable[..., Tensor]
    tensors: Sequence[Tensor]
    see: Callable[[Tensor], Tensor]
    pick: Callable[[Sequence[Tensor]], Sequence[Tensor]]

    @functools.lru_cache(maxsize=2)  # noqa: B019 - it holds little, and all who run the same cell share it
    def solve(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """y of the loop in `dtype`, a random dy, and the gradients of the part by it."""
        leaves = [v.detach().to(dtype).requires_grad_() for v in self.pick(self.tensors)]
        with torch.enable_grad():
            y = self.loop(*leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
        return y.detach(), dy, torch.autograd.grad(y, leaves, dy, materialize_grads=True)


@dataclass(frozen=True, eq=False)
class Entry:
    """One way to run a case: `run(*inputs) -> y`, differentiable by `inputs` and `weights`; `graph`: whether a CUDA graph may
    replay it (not where launching it step by step is the point)."""

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    truth: Truth
    graph: bool = True

    def __post_init__(self):
        for v in (*self.inputs, *self.weights):
            v.requires_grad_()

    def gradients(self, y: Tensor, inputs: Sequence[Tensor], dy: Tensor) -> tuple[Tensor, ...]:
        """The gradients of `y`, run on `inputs`, by inputs and weights."""
        return torch.autograd.grad(y, [*inputs, *self.weights], dy)


@dataclass(frozen=True)
class Contestant:
    """A name and `enter`, which raises `BackendError` where it cannot run; beside the `cells` (all, if none is named), up to
    `longest` steps; from the PyPI `package`."""

    name: str
    enter: Callable[[Case, torch.device], Entry]
    cells: tuple[str, ...] = ()
    longest: float = math.inf
    package: str = ""

    def fits(self, case: Case) -> bool:
        """Whether it belongs beside this case's cell."""
        return not self.cells or case.cell in self.cells


def agreement(entry: Entry, train: bool) -> dict[str, Any]:
    """Largest error of y and largest relative error of a gradient; `status` is "wrong" outside the library's own contract."""
    truth, dtype = entry.truth, entry.inputs[0].dtype
    absolute, relative, bound = BOUNDS[dtype]
    (exact, dy, exact_grads), (own, _, own_grads) = truth.solve(torch.float64), truth.solve(compute_dtype(dtype))
    with torch.set_grad_enabled(train):
        y = entry.run(*entry.inputs)
    error, allowed = (truth.see(y.detach()) - exact).abs(), 2 * (own - exact).abs().max()
    right = bool((error <= (absolute + relative * exact.abs()).maximum(allowed)).all())
    off = None
    if train:
        whole = torch.zeros_like(y)
        truth.see(whole).copy_(dy)
        off = _worst(map(relative_error, truth.pick(entry.gradients(y, entry.inputs, whole)), exact_grads))
        right &= off <= max(bound, 2 * _worst(map(relative_error, own_grads, exact_grads)))
    found = {"error": _worst([float(error.max())]), "gradient_error": off, "compared_steps": min(STEPS, y.shape[1])}
    return {"status": "ok" if right else "wrong", **found}


def _worst(errors: Iterable[float]) -> float:
    return max(v if math.isfinite(v) else math.inf for v in errors)
