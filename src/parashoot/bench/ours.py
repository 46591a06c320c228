"""The library's own contestants, and the loops over the same cell."""

from __future__ import annotations

import contextlib
import functools
import signal
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..plan import MultipleShooting, compute_dtype
from ..scan import scan
from ..solve.sequential import loop
from .case import Case, problem
from .contest import Contestant, Entry, Skip, Truth

PART = (2, 64)  # sequences and channels that are compared with the loop
STEPS = 16  # steps of the loop in one compiled graph
COMPILE_SECONDS = 240.0


@functools.lru_cache(maxsize=2)
def cell_truth(case: Case, device: torch.device, steps: int) -> Truth:
    """The for-loop over the case's cell; its leaves are on the CPU, where a loop over so little is fastest."""
    cell, (x, params) = case.step, problem(case, device)
    sequences, channels = PART[0], case.channels if cell.structure == "dense" else min(PART[1], case.channels)
    if cell.width:
        channels -= channels % cell.width
    part = lambda v: v[:sequences, :steps, ..., :channels]
    cut = lambda p: p if p.dim() == 2 else p[: channels // cell.width] if p.dim() == 3 and cell.width else p[:channels]
    return Truth(
        [part(x).detach().cpu(), *(cut(p).detach().cpu() for p in params)],
        lambda x, *params: loop(cell, x, params)[0],
        part,
        lambda grads: [part(grads[0]), *(cut(g) for g in grads[1:])],
    )


def on_the_cell(
    case: Case, device: torch.device, run: Callable[[Tensor, list[Tensor]], Tensor], graph: bool = True
) -> Entry:
    """An entry that runs the case's own cell as `run(x, params) -> y`."""
    x, params = problem(case, device)
    final = case.batch * case.channels * len(case.step.states) * x.itemsize
    truth = lambda steps: cell_truth(case, device, steps)
    return Entry((x,), tuple(params), lambda x: run(x, params), truth, final, graph=graph)


def scan_by(backend: str) -> Callable[[Case, torch.device], Entry]:
    """`ps.scan` with one backend."""
    solver = MultipleShooting(backend=backend)

    def enter(case: Case, device: torch.device) -> Entry:
        return on_the_cell(case, device, lambda x, params: scan(case.step, x, params or None, solver=solver)[0])

    return enter


def _loop(case: Case, x: Tensor, params: list[Tensor]) -> Tensor:
    return loop(case.step, x, params, _start(case, x))[0].to(x.dtype)


def _start(case: Case, x: Tensor) -> Tensor:
    """The zero state (B, S, C) in the compute dtype, which makes the whole loop compute in it."""
    return x.new_zeros(x.shape[0], len(case.step.states), x.shape[3], dtype=compute_dtype(x.dtype))


def looped(graph: bool) -> Callable[[Case, torch.device], Entry]:
    """The Python loop over the step, launched step by step or replayed from one CUDA graph."""

    def enter(case: Case, device: torch.device) -> Entry:
        if graph and device.type != "cuda":
            raise Skip("CUDA graphs need a GPU")
        return on_the_cell(case, device, functools.partial(_loop, case), graph)

    return enter


def compiled(case: Case, device: torch.device) -> Entry:
    """The loop as `torch.compile` makes it, `STEPS` steps unrolled in a graph, state handed from call to call."""
    torch.compiler.reset()  # graphs of earlier cases count towards the compiler's limit
    fast = torch.compile(lambda x, params, h: loop(case.step, x, params, h), dynamic=False, fullgraph=True)

    def run(x: Tensor, params: list[Tensor]) -> Tensor:
        h, ys = _start(case, x).requires_grad_(torch.is_grad_enabled()), []  # as in later pieces: one graph serves all
        for piece in x.split(STEPS, 1):
            y, h = fast(piece, params, h)
            ys.append(y)
        return torch.cat(ys, 1).to(x.dtype)

    entry = on_the_cell(case, device, run)
    with time_limit(COMPILE_SECONDS):
        with torch.no_grad():
            y = entry.run(*entry.inputs)
        if case.mode == "train":
            entry.gradients(entry.run(*entry.inputs), entry.inputs, torch.ones_like(y))
    return entry


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raise `Skip` in the block once `seconds` have passed (in the main thread of a system with timers; elsewhere no limit)."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(number: int, frame: object) -> None:
        raise TimeoutError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    except Exception as e:  # the compiler may wrap the timeout in an error of its own
        if signal.getitimer(signal.ITIMER_REAL)[0] > 0:
            raise
        raise Skip(f"took longer than {seconds:.0f} s to compile") from e
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


OURS = (
    Contestant("scan-triton", "ps.scan, generated kernels", scan_by("triton")),
    Contestant("scan-torch", "ps.scan, PyTorch operations", scan_by("torch")),
    Contestant("loop", "the Python loop over the step", looped(graph=False), longest=2048),
    Contestant("loop-graph", "the same loop, replayed from a CUDA graph", looped(graph=True), longest=2048),
    Contestant("loop-compiled", f"the loop under torch.compile, {STEPS} steps a graph", compiled, longest=512),
)
