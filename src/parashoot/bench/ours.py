"""The library's own contestants, and the loops over the same cell."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import BackendError
from ..plan import MultipleShooting, compute_dtype
from ..scan import scan
from ..solve.sequential import loop
from .cases import Case, problem
from .contest import CHANNELS, SEQUENCES, STEPS, Contestant, Entry, Truth

UNROLLED = 16  # steps of the loop in one compiled graph


@functools.lru_cache(maxsize=1)
def cell_truth(case: Case, device: torch.device) -> Truth:
    """The for-loop over the case's cell, shared by all who run that cell."""
    cell, (x, params) = case.step, problem(case, device)
    channels = CHANNELS if cell.structure == "channelwise" else case.channels
    part = lambda v: v[:SEQUENCES, :STEPS, ..., :channels]
    pick = lambda tensors: [part(tensors[0]), *(p[:channels] for p in tensors[1:])]
    return Truth(lambda x, *params: loop(cell, x, params)[0], [x, *params], part, pick)


def on_the_cell(case: Case, device: torch.device, run: Callable[[Tensor], Tensor], **options: Any) -> Entry:
    """An entry that runs the case's own cell on the problem's parameters (or on `weights`, copies of them)."""
    x, params = problem(case, device)
    return Entry((x,), run=run, truth=cell_truth(case, device), **{"weights": tuple(params), **options})


def by_scan(backend: str, case: Case, device: torch.device) -> Entry:
    """`ps.scan` with one backend: generated kernels, or PyTorch operations."""
    params, solver = problem(case, device)[1] or None, MultipleShooting(backend=backend)
    return on_the_cell(case, device, lambda x: scan(case.step, x, params, solver=solver)[0])


def by_loop(graph: bool, case: Case, device: torch.device) -> Entry:
    """The Python loop over the step, launched step by step or replayed from one CUDA graph."""
    if graph and device.type != "cuda":
        raise BackendError("needs a GPU")
    params = problem(case, device)[1]
    run = lambda x: loop(case.step, x, params, _start(case, x))[0].to(x.dtype)
    return on_the_cell(case, device, run, graph=graph)


def compiled(case: Case, device: torch.device) -> Entry:
    """The loop as `torch.compile` makes it, `UNROLLED` steps in a graph, the state handed from call to call."""
    params = problem(case, device)[1]
    torch.compiler.reset()  # graphs of earlier cases count towards the compiler's limit
    piece = torch.compile(lambda x, params, h: loop(case.step, x, params, h), dynamic=False, fullgraph=True)

    def run(x: Tensor) -> Tensor:
        h, ys = _start(case, x).requires_grad_(torch.is_grad_enabled()), []  # as in later pieces: one graph serves all
        for part in x.split(UNROLLED, 1):
            y, h = piece(part, params, h)
            ys.append(y)
        return torch.cat(ys, 1).to(x.dtype)

    return on_the_cell(case, device, run)


def _start(case: Case, x: Tensor) -> Tensor:
    """The zero state (B, S, C) in the compute dtype, which makes the whole loop compute in it."""
    return x.new_zeros(x.shape[0], len(case.step.states), x.shape[3], dtype=compute_dtype(x.dtype))


OURS = (
    Contestant("scan-triton", functools.partial(by_scan, "triton")),
    Contestant("scan-torch", functools.partial(by_scan, "torch")),
    Contestant("loop", functools.partial(by_loop, False), longest=2048),
    Contestant("loop-graph", functools.partial(by_loop, True), longest=2048),
    Contestant("loop-compiled", compiled, longest=512),
)
