"""Who takes part: a contestant enters a case with a way to run its recurrence and with the truth it is judged by."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .case import Case


class Skip(Exception):
    """A contestant takes no part in a case; the message says why."""


@dataclass(frozen=True, eq=False)
class Truth:
    """The same recurrence as a for-loop over a part of the problem (some sequences, channels and first steps, which decide
    that part of the result alone).

    - `leaves`: the part's inputs and weights, on any device, in the dtype that the contestant reads.
    - `run(*leaves) -> y`, differentiable, in whichever dtype the leaves come.
    - `see(y)`: a view of the same part of the contestant's y.
    - `pick(grads)`: that part of the contestant's gradients, one a leaf; None where it has no counterpart.
    """

    leaves: Sequence[Tensor]
    run: Callable[..., Tensor]
    see: Callable[[Tensor], Tensor]
    pick: Callable[[Sequence[Tensor]], Sequence[Tensor | None]]


@dataclass(frozen=True, eq=False)
class Entry:
    """One way to run a case.

    - `inputs`: the sequences it reads; `weights`: what else has gradients.
    - `run(*inputs) -> y`, in training differentiable by inputs and weights.
    - `truth(steps)`: its `Truth` over the first `steps` steps.
    - `final_bytes` of the final state; `read_bytes` that the recurrence itself reads, where that is not its `inputs`.
    - `extra`: work done by `run` that is no part of the recurrence, timed alone and subtracted.
    - `graph`: whether a CUDA graph may replay it (not where launching it step by step is the point).
    """

    inputs: tuple[Tensor, ...]
    weights: tuple[Tensor, ...]
    run: Callable[..., Tensor]
    truth: Callable[[int], Truth]
    final_bytes: int = 0
    read_bytes: int | None = None
    extra: Entry | None = None
    graph: bool = True

    def gradients(self, y: Tensor, inputs: Sequence[Tensor], dy: Tensor, retain: bool = False) -> tuple[Tensor, ...]:
        """The gradients of `y`, run on `inputs`, by inputs and weights."""
        return torch.autograd.grad(y, [*inputs, *self.weights], dy, retain_graph=retain, allow_unused=True)

    def floors(self, y: Tensor) -> tuple[int, int]:
        """Bytes that must move once: forward (inputs, y, final state) and backward (inputs, y, dy read, their gradients written)."""
        read = sum(v.nbytes for v in self.inputs) if self.read_bytes is None else self.read_bytes
        return read + y.nbytes + self.final_bytes, 2 * read + 2 * y.nbytes


@dataclass(frozen=True)
class Contestant:
    """A name, a line on what it computes, and `enter`, which raises `Skip` where it cannot run.

    It stands beside the cells named in `cells` (all, if none is), up to `longest` steps, and comes with the PyPI `package`.
    """

    name: str
    about: str
    enter: Callable[[Case, torch.device], Entry]
    cells: tuple[str, ...] = ()
    longest: int | None = None
    package: str = ""

    def fits(self, case: Case) -> bool:
        """Whether it belongs beside this case's cell."""
        return not self.cells or case.cell in self.cells
