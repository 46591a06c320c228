"""How contestants are tried: each way to run a recurrence is compared with the fp64 loop over the same, and timed."""

from __future__ import annotations

import itertools
import math
import statistics
import timeit
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from ..diagnostics import BOUNDS, relative_error
from ..plan import compute_dtype
from .cases import Case

Call = Callable[[], Any]
Clock = Callable[[], float]  # seconds of one call, measured anew each time
SEQUENCES, STEPS, CHANNELS = 2, 2**12, 64  # the part of a result that is compared: the loop is too slow for more


@dataclass(frozen=True, eq=False)
class Truth:
    """A recurrence as a for-loop, over a part of the problem that alone decides the same part of the result.

    `loop(*pick(tensors)) -> y` is differentiable, in whichever dtype the `tensors` (inputs and weights) come; `see(y)`
    is a view of that part of a contestant's y, `pick(grads)` of its gradients.
    """

    loop: Callable[..., Tensor]
    tensors: Sequence[Tensor]
    see: Callable[[Tensor], Tensor]
    pick: Callable[[Sequence[Tensor]], Sequence[Tensor]]

    @lru_cache(maxsize=2)  # noqa: B019 - it holds little, and all who run the same cell share it
    def solve(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Sequence[Tensor]]:
        """y of the loop in `dtype`, a random dy, and the gradients of the part by it."""
        leaves = [v.detach().to(dtype).requires_grad_() for v in self.pick(self.tensors)]
        with torch.enable_grad():
            y = self.loop(*leaves)
        dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(y)
        if not y.requires_grad:  # a cell that only compares its inputs
            return y, dy, [torch.zeros_like(v) for v in leaves]
        return y.detach(), dy, torch.autograd.grad(y, leaves, dy, materialize_grads=True)


@dataclass(frozen=True, eq=False)
class Entry:
    """One way to run a case: `run(*inputs) -> y`, differentiable by `inputs` and `weights`; `graph`: whether a CUDA
    graph may replay it (not where launching it step by step is the point)."""

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
    """For `cells` (all, if none is named) up to `longest` steps; `enter` raises `BackendError` where it cannot run."""

    name: str
    enter: Callable[[Case, torch.device], Entry]
    cells: tuple[str, ...] = ()
    longest: float = math.inf
    package: str = ""

    def fits(self, case: Case) -> bool:
        """Whether it belongs beside this case's cell."""
        return not self.cells or case.cell in self.cells


def agreement(entry: Entry, train: bool) -> dict[str, Any]:
    """Largest error of y, largest relative error of a gradient; `status` "wrong" outside the library's own contract."""
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


def clocks(entry: Entry, train: bool) -> tuple[int | None, str, dict[str, Clock]]:
    """Bytes at the peak beside inputs (None on a CPU), how it is timed, clocks of "forward" and, in training, "both".

    The backward pass alone is the difference: not every contestant can repeat it after one forward pass.
    """

    def forward(inputs: Sequence[Tensor]) -> Tensor:
        with torch.set_grad_enabled(train):
            return entry.run(*inputs)

    def both(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return entry.gradients(entry.run(*inputs), inputs, dy)

    dy = torch.randn_like(forward(entry.inputs))
    passes = {"forward": forward, "both": both} if train else {"forward": forward}
    if not dy.is_cuda:
        return None, "wall clock", {k: launched(in_turn(call, entry.inputs), False) for k, call in passes.items()}
    torch.cuda.reset_peak_memory_stats()
    start, problem = torch.cuda.memory_allocated(), ""
    (both if train else forward)(entry.inputs)
    peak = torch.cuda.max_memory_allocated() - start
    calls = {k: in_turn(call, entry.inputs) for k, call in passes.items()}
    if entry.graph:
        try:
            return peak, "graph", {k: graphed(c) for k, c in calls.items()}
        except Exception as e:
            problem = f", no graph: {first_line(e)}"
    return peak, f"events{problem}", {k: launched(c, True) for k, c in calls.items()}


def in_turn(call: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]) -> list[Call]:
    """Calls for some two milliseconds, at most 40, on the inputs and as many copies as overflow the GPU's L2 cache, up to 15:
    inputs of less than some 12 MB come from there."""
    call(inputs)
    gpu, turns = inputs[0].is_cuda, [inputs]
    seconds = launched([partial(call, inputs)], gpu)()
    if gpu and seconds < 1e-2:  # beyond, reading the inputs is nothing
        cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
        copies = min(16, math.ceil(4 * cache / sum(v.nbytes for v in inputs))) - 1
        turns += [[v.detach().clone().requires_grad_() for v in inputs] for _ in range(copies)]
    count = max(len(turns), min(40, math.ceil(2e-3 / seconds)))
    return [partial(call, turn) for turn in itertools.islice(itertools.cycle(turns), count)]


def graphed(calls: Sequence[Call]) -> Clock:
    """Replays a CUDA graph of all `calls`; the current stream must not be the default one."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a call that waits for the GPU cannot be captured: find out before trying
    try:
        calls[0]()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    replay = launched([graph.replay], True)
    replay()
    return lambda: replay() / len(calls)  # holding `calls` also keeps alive the memory that the graph reads


def launched(calls: Sequence[Call], gpu: bool) -> Clock:
    """Runs `calls`, on a GPU between two CUDA events, on a CPU between two looks at the clock."""

    def run() -> None:
        for call in calls:
            call()

    def by_events() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(calls)

    return by_events if gpu else lambda: timeit.timeit(run, number=1) / len(calls)


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of a copy far larger than any cache: median of 20, the faster of two ways."""
    gpu = device.type == "cuda"
    source = torch.ones(2**28 if gpu else 2**25, device=device)  # 1 GiB, 128 MiB
    target = torch.empty_like(source)
    ways = (lambda: target.copy_(source), lambda: torch.neg(source, out=target))
    clocks = [launched([way], gpu) for way in ways]
    return 2 * source.nbytes / min(statistics.median(clock() for _ in range(20)) for clock in clocks)


def first_line(e: BaseException) -> str:
    """An exception in a line."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
