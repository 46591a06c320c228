"""What is run: a case is a cell, a shape and a dtype; a suite is some cases and the names of the contestants."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import cells
from ..cell import Cell, parameter_shapes
from ..plan import compute_dtype

SIGMA = 0.25  # small enough for solvers that stop after a fixed number of iterations


@dataclass(frozen=True)
class Case:
    """A shipped `cell`, "headgru/16" with heads of 16, on x (B, T, G, C) of a `dtype`; `mode`: "train" or, without gradients, "infer"; recurrent
    weights have the deviation `sigma` (matrices: over sqrt(n))."""

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
        return _shipped(self.cell)

    @property
    def storage(self) -> torch.dtype:
        """The dtype of x and y."""
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        mode = "" if self.mode == "train" else f" {self.mode}"
        dtype = self.dtype.replace("float", "f" if self.dtype[0] == "b" else "fp")
        sigma = "" if self.sigma == SIGMA else f" sigma={self.sigma:g}"
        return f"{self.cell} {dtype} {self.batch} x {self.time} x {self.channels}{mode}{sigma}"


@functools.cache
def _shipped(name: str) -> Cell:
    name, _, width = name.partition("/")
    return getattr(cells, name).with_width(int(width)) if width else getattr(cells, name)


@functools.lru_cache(maxsize=1)
def problem(case: Case, device: torch.device) -> tuple[Tensor, list[Tensor]]:
    """x (B, T, G, C) ~ N(0, 1), parameters ~ sigma N(0, 1) in the compute dtype, exact in the storage dtype too."""
    cell, generator = case.step, torch.Generator(device).manual_seed(0)
    draw = functools.partial(torch.randn, generator=generator, device=device, dtype=case.storage)
    x = draw(case.batch, case.time, len(cell.inputs), case.channels)
    shapes = parameter_shapes(cell, case.channels)
    params = [draw(s) * (case.sigma / (s[-1] ** 0.5 if len(s) > 1 else 1.0)) for s in shapes]
    return x, [p.to(compute_dtype(case.storage)) for p in params]


@dataclass(frozen=True)
class Suite:
    """What it shows, the cases, and the names of the contestants (beside each cell, those that fit it)."""

    about: str
    cases: tuple[Case, ...]
    contestants: tuple[str, ...]


def _cases(names: str, shapes: Sequence[tuple[int, int, int]], dtypes: str = "bfloat16", **options) -> tuple[Case, ...]:
    return tuple(Case(c, *s, dtype, **options) for c in names.split() for s in shapes for dtype in dtypes.split())


OURS = ("scan-triton", "scan-torch")
PARARNN = ("pararnn-torch", "pararnn-torch-unchecked")
PEERS = (*PARARNN, "cudnn-gru", "cudnn-lstm", "hgrn", "gated-delta", "accelerated-scan", "flashrnn")
BIG, SMALL, LONG = (8, 2048, 2048), (8, 2048, 256), (1, 16384, 1024)
BOTH = "bfloat16 float32"

SUITES = {
    "quick": Suite(
        "a small case of each kind, in seconds, also on a CPU",
        _cases("gru lstm", [(2, 256, 32)], "float32") + _cases("mingru", [(2, 256, 32)], "float32", mode="infer"),
        (*OURS, "loop"),
    ),
    "table": Suite(
        "every channelwise cell at the size of a language model's layer, and ParaGRU at other sizes",
        _cases("gru", [BIG, SMALL, LONG], BOTH)
        + _cases("gru", [BIG], BOTH, mode="infer")
        + _cases("gru", [(1, 2**20, 256)])
        + _cases("lstm slstm elman_diagonal mingru", [BIG]),
        OURS,
    ),
    "peers": Suite(
        "other people's kernels for the same cell, and for recurrences that are as near as they offer",
        _cases("gru lstm", [BIG, SMALL, LONG], BOTH)
        + _cases("gru", [SMALL], "float32", sigma=1.0)
        + _cases("gru", [SMALL], "float32", sigma=2.0),
        (*OURS, *PEERS),
    ),
    "heads": Suite(
        "cells whose heads mix their state, beside the same kernel with one chunk, which is sequential; and FlashRNN's LSTM, "
        "in heads of 32",
        _cases("headgru/8 headgru/16", [BIG], BOTH) + _cases("headrotor headlstm/8 headlstm/16 headlstm/32", [BIG]),
        ("scan-triton", "scan-sequential", "flashrnn"),
    ),
    "paper": Suite(
        "the loops that the parallel solution replaces: compiled at T = 512, as in the paper (which gives no batch "
        "and no width), and as Python runs it at T = 2048",
        _cases("gru lstm", [(8, 512, 1024)], "float32") + _cases("gru", [SMALL], BOTH),
        (*OURS, "loop", "loop-graph", "loop-compiled"),
    ),
    "time": Suite(
        "time against the length of the sequence",
        _cases("gru", [(1, 2**k, 256) for k in range(7, 21)]),
        (*OURS, "loop", *PARARNN, "cudnn-gru", "hgrn"),
    ),
    "width": Suite(
        "time against the number of sequences x channels",
        _cases("gru", [(8, 2048, 2**k) for k in range(4, 14)]),
        (*OURS, *PARARNN, "cudnn-gru", "hgrn"),
    ),
}
