"""How to solve: the solvers, as values, and the plan that a solver and a problem's shape lead to.

This is the one place where a backend and a chunk length are chosen, and `explain` prints why.
"""

from __future__ import annotations

import functools
import importlib.util
import math
import os
from dataclasses import dataclass

import torch
from torch import Tensor

from .cell import Cell, feature_shape, sizes
from .errors import BackendError, bad_type, bad_value
from .tiling import HEAD_ROWS, Tiling, choose, choose_heads, lead_for, processors_of, tuned
from .trace import Trace, trace, trace_of

JACOBIANS = ("auto", "exact", "diagonal", "zero")
BACKENDS = ("auto", "torch", "triton")
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


@dataclass(frozen=True)
class Sequential:
    """The for-loop: T dependent steps, one sweep, the exact adjoint behind it."""


@dataclass(frozen=True)
class MultipleShooting:
    """Multiple-shooting Newton (DESIGN: cut time into chunks, shoot, correct).

    - `chunk_length`: steps a chunk, or "auto" (chosen from shape and device).
    - `tol`: largest defect, and largest predicted correction, relative to max(1, |state|); None: 1e-6 in fp32 (and for
      bf16/fp16 storage), 1e-12 in fp64; tighter when the Jacobian is not exact.
    - `max_iters`: sweeps allowed; None: until converged, which takes at most as many sweeps as there are chunks.
    - `jacobian`: "exact", "diagonal" (quasi-Newton) or "zero" (fixed point); "auto" takes "zero" where matrices are large.
    - `backend`: "auto", "torch" or "triton".
    """

    chunk_length: int | str = "auto"
    tol: float | None = None
    max_iters: int | None = None
    jacobian: str = "exact"
    backend: str = "auto"

    def __post_init__(self) -> None:
        c = self.chunk_length
        if isinstance(c, bool) or not (c == "auto" or (isinstance(c, int) and c >= 1)):
            bad_value("chunk_length", repr(c), "'auto' or an integer >= 1")
        if self.tol is not None and not (isinstance(self.tol, (int, float)) and 0 <= self.tol < math.inf):
            bad_value("tol", repr(self.tol), "None or a finite number >= 0")
        if self.max_iters is not None and (
            isinstance(self.max_iters, bool) or not isinstance(self.max_iters, int) or self.max_iters < 1
        ):
            bad_value("max_iters", repr(self.max_iters), "None or an integer >= 1")
        if self.jacobian not in JACOBIANS:
            bad_value("jacobian", repr(self.jacobian), f"one of {JACOBIANS}")
        if self.backend not in BACKENDS:
            bad_value("backend", repr(self.backend), f"one of {BACKENDS}")


def Newton(
    tol: float | None = None, max_iters: int | None = None, jacobian: str = "exact", backend: str = "auto"
) -> MultipleShooting:
    """All-at-once Newton, as in ParaRNN and DEER: `MultipleShooting` with chunks of one step."""
    return MultipleShooting(1, tol, max_iters, jacobian, backend)


AUTO = MultipleShooting(jacobian="auto")
Solver = Sequential | MultipleShooting


@dataclass(frozen=True)
class Plan:
    """What will run: `chunks` chunks of `chunk_length` steps, linearized `window` elements at a time."""

    backend: str
    chunk_length: int
    chunks: int
    jacobian: str
    tol: float
    max_iters: int | None
    window: int
    lazy: float | None  # tolerance up to which Jacobians are not formed at all, and else in the backward pass at least
    patience: int | None  # sweeps after which what is not exact yet runs in order
    autograd: bool  # one chunk: differentiate the plain loop, which is then the fastest
    tiling: Tiling | None  # how generated kernels cut the problem; None: PyTorch operations
    backward: Tiling | None  # the same of the backward pass
    reasons: tuple[str, ...]


def check_solver(solver: object) -> Solver:
    """The solver, or the automatic one for None. Raises `ArgumentTypeError` for anything that is not a solver value."""
    if solver is None:
        return AUTO
    if not isinstance(solver, (Sequential, MultipleShooting)):
        bad_type(
            "solver",
            solver,
            "ps.Sequential(), ps.MultipleShooting(...), ps.Newton() or None",
            "Pass a value, not a class or a name.",
        )
    return solver


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 computes in fp64, everything else in fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


# Seconds for one elementwise operation: to start it, and for each element (measured on two CPU cores and on an H100).
_COST = {"cpu": (2.5e-6, 0.35e-9), "cuda": (6e-6, 0.006e-9)}
_WINDOW = {"cpu": 2**17, "cuda": 2**24}
_EXACT_WIDTH = 16  # widest matrices for which exact products are cheaper than further sweeps


@functools.lru_cache(maxsize=4096)
def make_plan(
    cell: Cell, x_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, solver: Solver, ops: tuple[int, int],
    instructions: tuple[int, int], foreign: tuple[str, ...], digest: str, turns: bool, memory: float,
) -> Plan:  # fmt: skip
    """The plan for x of `x_shape` (B, T, G, C); `ops`: operations of a step and of its Jacobian; `foreign` those operations that have
    no kernel expression; `digest` the cell's; `instructions` of the step and its adjoint; `turns` and `memory` as in `Trace`."""
    batch, time, _, channels = x_shape
    obstacle = no_kernel(cell, dtype, device, solver, foreign)
    if obstacle is None:
        return _kernel_plan(cell, x_shape, dtype, device, solver, instructions, digest, turns, memory)
    asked = isinstance(solver, MultipleShooting) and solver.backend == "triton"
    if asked:
        raise BackendError(f"backend: got 'triton'; {obstacle}. Use backend='auto' or 'torch'.")
    tol = TOLERANCE[compute_dtype(dtype)]
    window = _WINDOW.get(device.type, _WINDOW["cuda"])
    if isinstance(solver, Sequential):
        kind = "exact" if cell.structure == "channelwise" else "zero"
        autograd = _by_autograd(cell, x_shape, device, ops[0])
        return Plan("torch", time, 1, kind, tol, None, window, None, None, autograd, None, None, ("asked for",))
    width = 1 if cell.structure == "channelwise" else (cell.width or channels) * len(cell.states)
    jacobian, lazy, reasons = solver.jacobian, None, []
    if device.type == "cuda":
        reasons.append(f"no kernel: {obstacle}")
    if jacobian == "auto":
        jacobian = "exact" if width <= _EXACT_WIDTH else "zero"
        reasons.append(
            f"{jacobian} Jacobian: {'one' if width == 1 else f'{width} x {width}'} per {'channel' if width == 1 else 'head'}"
        )
        if jacobian == "exact" and width > 1 and cell.structure != "channelwise":
            share = _share(batch * channels, width, ops, device)
            lazy = (_tolerance(tol, "zero", dtype) if solver.tol is None else solver.tol) if share <= 1 else None
            jacobian = "exact" if share <= 1 / 8 else "zero"  # several sweeps, each some three times what is reckoned
            reasons.append(
                "formed only if a sweep without it does not converge" if jacobian == "exact"
                else f"formed {'only for gradients that a sweep without does not give' if lazy else 'nowhere'}: a sweep with it is reckoned at {share:.1f} of the loop"
            )  # fmt: skip
    if solver.chunk_length == "auto":
        linear = _linear_ops(width, "zero" if lazy else jacobian, ops)
        shortest = 16 if cell.structure == "channelwise" else 128  # their backward starts many more operations a step
        length = _choose_length(time, batch * channels, linear, device, ops[0], shortest, reasons)
    else:
        length = min(int(solver.chunk_length), time)
        reasons.append("chunk length asked for")
    tol = solver.tol if solver.tol is not None else _tolerance(tol, jacobian, dtype)
    chunks = -(-time // length)
    patience = None
    cheap = jacobian == "zero" or cell.structure == "channelwise"
    # A sweep with Jacobians costs several without.
    least, share = 8 if cheap else 4, 8 if jacobian == "zero" else 32
    if solver.chunk_length == "auto" and solver.max_iters is None and chunks > (1 if jacobian == "zero" else least):
        patience = max(least, chunks // share)
        reasons.append(f"what {patience} sweeps have not made exact runs in order")
    autograd = chunks == 1 and _by_autograd(cell, x_shape, device, ops[0])
    return Plan(
        "torch", length, chunks, jacobian, tol, solver.max_iters, window, lazy, patience, autograd, None, None, tuple(reasons)
    )  # fmt: skip


SHORTEST_KERNEL_CHUNK = 16
MOST_KERNEL_SLOTS = 4
WIDEST_KERNEL_HEAD = 32


def _kernel_jacobian(cell: Cell) -> str:
    """Heads are led into and corrected without Jacobians: as exact, by more passes, at last in order."""
    return "exact" if cell.width is None else "zero"


@functools.cache
def triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def no_kernel(
    cell: Cell, dtype: torch.dtype, device: torch.device, solver: Solver, foreign: tuple[str, ...]
) -> str | None:
    """Why generated kernels do not run this, or None if they do. The answer does not depend on the shape."""
    if cell.structure == "dense":
        return f"kernels are generated for channelwise and headwise cells, and '{cell.name}' is dense"
    if (cell.width or 1) > WIDEST_KERNEL_HEAD:
        return (
            f"kernels take heads of at most {WIDEST_KERNEL_HEAD} channels, and those of '{cell.name}' have {cell.width}"
        )
    if len(cell.states) > MOST_KERNEL_SLOTS:
        return f"kernels hold at most {MOST_KERNEL_SLOTS} states a channel, and '{cell.name}' has {len(cell.states)}"
    if foreign:
        return f"the step of '{cell.name}' or its derivative uses {', '.join(foreign)}, which has no kernel expression"
    if dtype == torch.float64:
        return "fp64 computes with PyTorch operations"
    if isinstance(solver, MultipleShooting):
        if solver.backend == "torch":
            return "backend 'torch' asked for"
        if solver.jacobian not in ("auto", "exact", _kernel_jacobian(cell)):
            return f"kernels correct with {_kernel_jacobian(cell)} Jacobians, and jacobian={solver.jacobian!r} was asked for"
        if not isinstance(solver.chunk_length, str) and solver.chunk_length < SHORTEST_KERNEL_CHUNK:
            return (
                f"kernels take chunks of at least {SHORTEST_KERNEL_CHUNK} steps, and chunk_length={solver.chunk_length}"
            )
    if not triton_is_installed():
        return "Triton is not installed (pip install triton)"
    asked = isinstance(solver, MultipleShooting) and solver.backend == "triton"
    if device.type == "cpu" and not (asked and os.environ.get("TRITON_INTERPRET") == "1"):
        return "tensors on the CPU need Triton's interpreter: set TRITON_INTERPRET=1 before Python starts"
    return None if device.type in ("cuda", "cpu") else f"kernels run on CUDA devices, not on '{device.type}'"


def backend_for(cell: Cell, dtype: torch.dtype, device: torch.device, solver: Solver) -> str:
    """ "triton" or "torch", whatever the shape."""
    if no_kernel(cell, dtype, device, solver, ()) is not None:
        return "torch"
    found = trace_of(cell, compute_dtype(dtype), device)
    return "torch" if no_kernel(cell, dtype, device, solver, found.foreign) else "triton"


# Defects within which kernels stop: below the rounding of what is stored.
_KERNEL_TOLERANCE = {torch.float32: 1e-6, torch.float16: 4e-5, torch.bfloat16: 1e-4}


def tolerance_backward(cell: Cell, dtype: torch.dtype) -> float:
    """Relative to the largest gradient at a chunk boundary of the same channel or head."""
    return 2 * _tolerance(_KERNEL_TOLERANCE[dtype], _kernel_jacobian(cell), dtype)


def _kernel_plan(
    cell: Cell, x_shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, solver: Solver, instructions: tuple[int, int],
    digest: str, turns: bool, memory: float,
) -> Plan:  # fmt: skip
    batch, time, _, channels = x_shape
    asked = None
    if isinstance(solver, Sequential):
        asked = time
    elif not isinstance(solver.chunk_length, str):
        asked = min(int(solver.chunk_length), time)
    slots, jacobian = len(cell.states), _kernel_jacobian(cell)
    tol, limit = (solver.tol, solver.max_iters) if isinstance(solver, MultipleShooting) else (None, None)
    tol = _tolerance(_KERNEL_TOLERANCE[dtype], jacobian, dtype) if tol is None else tol
    problem = (batch, time, channels, dtype.itemsize, slots)
    if cell.width is None:
        given = (*problem, instructions, processors_of(device), asked)
        lead = lead_for(memory, tol / 8)  # what the lead itself asks for
        (tiling, reasons), (back, _) = (choose(*given, backward, lead) for backward in (False, True))
    else:
        back, reasons = tiling, _ = choose_heads(*problem, cell.width, processors_of(device), asked, turns)
    measured = tuned(device).get(str((digest, str(dtype), *x_shape))) if asked is None else None
    # Saved states stand at multiples of the unroll.
    if measured is not None and all(t.unroll == tiling.unroll for t in measured):
        tiling, back = measured
        reasons = (f"{tiling.chunks} chunks: the fastest that ps.tune measured on this device",)
    length, chunks = tiling.cut(time)
    rows = "a chunk" if cell.width is None else f"{HEAD_ROWS} chunks"
    tile = f"a program takes {tiling.columns} channels of {rows}, {tiling.unroll} steps a loop trip, {tiling.stages} trips loaded ahead"
    if chunks > 1:
        tile += f"; it leads in over {min(tiling.burn, length)} steps" + (" or more" if cell.width is None else "")
    if (backward := back.cut(time)[1]) != chunks:
        tile += f"; backward {backward} chunk{'s' * (backward > 1)}"
    reasons = (*reasons, tile)
    return Plan("triton", min(length, time), chunks, jacobian, tol, limit, 0, None, None, False, tiling, back, reasons)


def _by_autograd(cell: Cell, x_shape: tuple[int, ...], device: torch.device, step: int) -> bool:
    """Whether autograd through a loop beats the adjoint behind it: very short, on a CPU very wide, or no matrices formed."""
    batch, time, _, channels = x_shape
    wide = device.type == "cpu" and batch * channels >= 4096
    return cell.structure != "channelwise" or time * step <= 150 or wide


def _tolerance(tol: float, jacobian: str, dtype: torch.dtype) -> float:
    """An inexact Jacobian leaves more error behind a defect; below a few roundings no defect can be told from noise."""
    return tol if jacobian == "exact" else max(tol / 10, 4 * torch.finfo(compute_dtype(dtype)).eps)


_LENGTHS = (16, 32, 64, 128, 256, 512, 1024, 2048)


def _linear_ops(width: int, jacobian: str, ops: tuple[int, ...]) -> int:
    """Elementary operations for each state element to form a step's Jacobian and multiply it on."""
    if jacobian == "zero":
        return 0
    return ops[1] + 1 if width == 1 else ops[0] * width + width * width


def _share(elements: int, width: int, ops: tuple[int, ...], device: torch.device) -> float:
    """What a sweep with matrices of `width` takes of the loop's time."""
    start, each = _COST.get(device.type, _COST["cuda"])
    return elements * _linear_ops(width, "exact", ops) * each / (ops[0] * (start + each * elements))


def _choose_length(
    time: int, width: int, linear_ops: int, device: torch.device, step: int, shortest: int, reasons: list[str]
) -> int:
    start, each = _COST.get(device.type, _COST["cuda"])

    def seconds(length: int) -> float:
        chunks = -(-time // length)
        once = length * step * (start + each * width * chunks)
        if chunks == 1:
            return once
        sweeps = 2 if length >= 64 else 3  # what cells take that forget within some tens of steps
        linear = time * width * linear_ops * each + (length * 2 + chunks * 12) * start
        return sweeps * once + (sweeps - 1) * linear + 200 * start

    best = min([time, *(n for n in _LENGTHS if min(64, shortest) <= n and 4 * max(n, shortest) <= time)], key=seconds)
    reasons.append(
        f"predicted {seconds(best) * 1e3:.2g} ms with chunks of {best}"
        + (
            f" against {seconds(time) * 1e3:.2g} ms for the loop"
            if best < time
            else ", the loop itself: too little to gain"
        )
    )
    return best


@dataclass(frozen=True)
class Explanation:
    """What `ps.scan` will do and why; prints as text, `to_dict()` gives the facts."""

    cell: str
    structure: str
    digest: str
    plan: Plan

    def to_dict(self) -> dict:
        p = self.plan
        return {
            "cell": self.cell, "structure": self.structure, "digest": self.digest, "backend": p.backend, "chunks": p.chunks,
            "chunk_length": p.chunk_length, "jacobian": p.jacobian, "tol": p.tol, "reasons": list(p.reasons),
        }  # fmt: skip

    def __str__(self) -> str:
        p = self.plan
        how = (
            "sequentially"
            if p.chunks == 1
            else f"in {p.chunks} chunks of {p.chunk_length} steps, {p.jacobian} Jacobian, tol {p.tol:g}"
        )
        return "\n".join([f"cell {self.cell}: {self.structure} (digest {self.digest[:12]})", f"backend {p.backend}, {how}",
                          *(f"  {r}" for r in p.reasons)])  # fmt: skip


def plan_for(cell: Cell, x: Tensor, params: list[Tensor], solver: Solver) -> tuple[Plan, Trace]:
    """The plan and the trace for these tensors; traces the step if it is new."""
    found = trace_for(cell, x, params)
    ops = found.step_ops, found.jacobian_ops
    facts = instructions_of(cell, found), found.foreign, found.digest, found.turns, found.memory
    return make_plan(cell, sizes(x), x.dtype, x.device, solver, ops, *facts), found


@functools.lru_cache(maxsize=4096)
def instructions_of(cell: Cell, found: Trace) -> tuple[int, int]:
    """Machine instructions of a GPU that the step and its adjoint take, roughly; zeros where they have no kernel."""
    if found.graph is None or found.adjoint is None:
        return 0, 0
    return found.graph.select(range(len(cell.states))).instructions(), found.adjoint.instructions()


def trace_for(cell: Cell, x: Tensor, params: list[Tensor]) -> Trace:
    """The trace of `cell` at the compute dtype of x (B, T, G, C), with parameters shaped as the step sees them."""
    shapes = tuple(tuple(p.shape) for p in params)
    return trace(cell, compute_dtype(x.dtype), x.device, feature_shape(cell, sizes(x)[3]), shapes)
