"""A case: which recurrence, of which shape, stored how. Inputs and weights are drawn here, the same for every contestant."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cells
from ..cell import Cell, parameter_shapes
from ..plan import compute_dtype

SHORT = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32", "float64": "fp64"}
SIGMA = 0.25  # small enough for solvers that stop after a fixed number of iterations


@dataclass(frozen=True)
class Case:
    """A shipped `cell` on x (B, T, G, C) of a `dtype`.

    `mode` "train" times the forward pass as it runs when gradients follow, and the backward pass; "infer" the forward pass
    without gradients. `sigma` is the deviation of the recurrent weights (matrices: over sqrt(n)).
    """

    cell: str
    batch: int
    time: int
    channels: int
    dtype: str = "bfloat16"
    mode: str = "train"
    sigma: float = SIGMA

    @property
    def step(self) -> Cell:
        """The cell itself."""
        return getattr(cells, self.cell)

    @property
    def storage(self) -> torch.dtype:
        """The dtype of x and y."""
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        extra = "" if self.mode == "train" else f" {self.mode}"
        extra += "" if self.sigma == SIGMA else f" sigma={self.sigma:g}"
        return f"{self.cell} {SHORT[self.dtype]} {self.batch} x {self.time} x {self.channels}{extra}"


@functools.lru_cache(maxsize=1)
def problem(case: Case, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """x (B, T, G, C) ~ N(0, 1) and the cell's parameters ~ sigma N(0, 1) in the compute dtype, all requiring gradients."""
    cell, generator = case.step, torch.Generator(device).manual_seed(0)
    options = {"generator": generator, "device": device}
    x = torch.randn(case.batch, case.time, len(cell.inputs), case.channels, dtype=case.storage, **options)
    dtype = compute_dtype(case.storage)
    drawn = (torch.randn(s, dtype=dtype, **options) for s in parameter_shapes(cell, case.channels))
    params = [p * case.sigma / (p.shape[-1] ** 0.5 if p.dim() > 1 else 1.0) for p in drawn]
    return x.requires_grad_(), [p.requires_grad_() for p in params]
