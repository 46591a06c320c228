"""`ps.scan`: run a cell over a sequence. Checks the arguments, then calls the operator in `op.py`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, parameter_shapes, sizes
from .errors import bad_type, bad_value
from .op import as_seen, run, summary
from .plan import Explanation, Solver, check_solver, compute_dtype, plan_for

FLOATING = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class ScanInfo:
    """How a scan was solved. Reading a field waits for the computation.

    `iterations` sweeps of the slowest sequence and `iterations_mean` over the batch, final `defect`, `chunk_length`, `backend`.
    """

    def __init__(self, stats: Tensor | list[float], facts: Tensor | None):
        self._stats, self._facts = stats, facts

    def _read(self, k: int) -> float:
        """Statistic k: from what the kernels left on the device, or from what PyTorch's solver counted."""
        if self._facts is None or self.backend == "torch":
            return float(self._stats[k])
        return float((summary(self._facts) if self._facts.dim() == 2 else self._facts)[k])

    iterations = property(lambda self: int(self._read(0)))
    iterations_mean = property(lambda self: self._read(1))
    defect = property(lambda self: self._read(2))
    chunk_length = property(lambda self: int(self._stats[4]))
    backend = property(lambda self: "triton" if self._stats[5] else "torch")

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        names = ("iterations", "iterations_mean", "defect", "chunk_length", "backend")
        return {name: getattr(self, name) for name in names}

    def __repr__(self) -> str:
        return f"ScanInfo({', '.join(f'{k}={v}' for k, v in self.to_dict().items())})"


def scan(
    cell: Cell,
    x: Tensor,
    params: Tensor | Sequence[Tensor] | None = None,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reverse: bool = False,
    solver: Solver | None = None,
    return_states: bool = False,
    return_info: bool = False,
) -> Any:
    """Run `h_t = f(h_{t-1}, x_t; params)` over t = 0..T-1, in parallel over time, with the for-loop's result.

    - `x` (B, T, G, C): the G inputs of the step; float64, float32, bfloat16 or float16, any strides. Or (B, T, G, H, C / H), the
      channels in H heads: generated kernels read heads of a multiple of 128 channels wherever they lie.
    - `params`: (P, C) when all parameters are vectors, else a tuple in the step's order, each (C,), for headwise cells also
      (H, n, n), for dense ones also (C, C); None when there are none. In x's dtype or float32.
    - `h0` (B, S, C) initial state, zeros by default, in x's dtype or float32.
    - `reset` (B, T) bool: no state crosses from t-1 to t where `reset[:, t]`, nor a gradient; the state entering is zero.
    - `reverse`: from t = T-1 down to 0; h0 enters at T-1, h_n is the state after t = 0, y stays in time order.
    - `solver`: `ps.Sequential()`, `ps.MultipleShooting(...)`, `ps.Newton()`; None chooses.

    Returns `(y, h_n)`: y (B, T, C) in x's dtype, the output state at each step, or all states (B, T, S, C) with
    `return_states`; h_n (B, S, C) the final state, in h0's dtype (x's without h0). With `return_info` also a `ScanInfo`.
    Both are differentiable by x, params and h0, once.

    Raises `ArgumentError`, `ArgumentTypeError`, `CellError`, `StructureError`, and `ConvergenceError` if the solver's
    `max_iters` was set and missed. Source: multiple shooting, Bock and Plitt 1984; Newton over the sequence, Lim et al. 2024
    (DEER), Danieli et al. 2025 (ParaRNN).
    """
    solver = check_solver(solver)
    params = check_arguments(cell, x, params, h0, reset)
    for name, value in (("reverse", reverse), ("return_states", return_states), ("return_info", return_info)):
        if not isinstance(value, bool):
            bad_type(name, value, "True or False")
    if h0 is None:
        h0 = x.new_zeros(x.shape[0], len(cell.states), sizes(x)[3])
    y, h_n, stats, facts = run(x, params, h0, reset, cell, reverse, return_states, solver, return_info)
    return (y, h_n, ScanInfo(stats, facts)) if return_info else (y, h_n)


def explain(
    cell: Any, x: Tensor, params: Tensor | Sequence[Tensor] | None = None, solver: Solver | None = None
) -> Explanation:
    """What `ps.scan(cell, x, ...)` would do and why: structure, backend, chunk length.

    `x` (B, T, G, C). `params` are needed only for their shapes, by headwise and dense cells; zeros of the shapes that the
    step takes stand in for None. Raises as `scan` does.
    """
    solver = check_solver(solver)
    if params is None and isinstance(cell, Cell) and isinstance(x, Tensor) and x.dim() in (4, 5):
        params = [x.new_zeros(shape) for shape in parameter_shapes(cell, sizes(x)[3])]
    params = check_arguments(cell, x, params, None, None)
    seen = as_seen(cell, params, compute_dtype(x.dtype))
    plan, found = plan_for(cell, x, seen, solver)
    return Explanation(cell.name, cell.structure, found.digest, plan)


def check_arguments(cell: Cell, x: Any, params: Any, h0: Any, reset: Any) -> list[Tensor]:
    """The parameters as a list, after every argument was checked against the cell's signature and against x."""
    if not isinstance(cell, Cell):
        bad_type("cell", cell, "a cell", "Decorate the step with @ps.cell.")
    if not isinstance(x, Tensor):
        bad_type("x", x, "a tensor (B, T, G, C)")
    gates, slots = len(cell.inputs), len(cell.states)
    inputs = f"the {gates} input(s) {', '.join(cell.inputs)} of cell '{cell.name}'"
    if x.dtype not in FLOATING:
        bad_value(
            "x",
            x,
            f"a floating dtype, one of {[str(d).removeprefix('torch.') for d in FLOATING]}",
            "Convert it with x.float().",
        )
    if x.dim() not in (4, 5) or x.shape[2] != gates:
        remedy = "For one input use x.unsqueeze(2)." if x.dim() == 3 and gates == 1 else ""
        bad_value("x", x, f"shape (B, T, G, C) with G = {gates}, {inputs}, or (B, T, G, H, C / H)", remedy)
    batch, time, _, channels = sizes(x)
    if time == 0 or batch == 0 or channels == 0:
        bad_value("x", x, "at least one sequence, one step (T >= 1) and one channel")
    if cell.width and channels % cell.width:
        bad_value("x", x, f"C divisible by the head width {cell.width} of cell '{cell.name}'")
    found = _check_params(cell, x, params)
    if h0 is not None:
        if not isinstance(h0, Tensor):
            bad_type("h0", h0, f"None or a tensor {(batch, slots, channels)}")
        if tuple(h0.shape) != (batch, slots, channels):
            bad_value("h0", h0, f"shape (B, S, C) = {(batch, slots, channels)}, one slot for each of {cell.states}")
        _same_place("h0", h0, x)
    check_reset(reset, x)
    return found


def check_reset(reset: Any, x: Tensor) -> None:
    """That it is None or a mask of the steps of x (B, T, ...)."""
    if reset is None:
        return
    if not isinstance(reset, Tensor):
        bad_type("reset", reset, "None or a bool tensor (B, T)")
    if reset.dtype != torch.bool or reset.shape != x.shape[:2]:
        shape = f"a bool tensor of shape (B, T) = {tuple(x.shape[:2])}"
        bad_value("reset", reset, shape, "True where a new sequence begins.")
    if reset.device != x.device:
        bad_value("reset", reset, f"the device of x, {x.device}")


def _same_place(name: str, v: Tensor, x: Tensor) -> None:
    if v.device != x.device:
        bad_value(name, v, f"the device of x, {x.device}")
    if v.dtype not in (x.dtype, torch.float32):
        bad_value(name, v, f"the dtype of x ({x.dtype}) or torch.float32")


def _check_params(cell: Cell, x: Tensor, params: Any) -> list[Tensor]:
    channels, names = sizes(x)[3], ", ".join(cell.params)
    count, what = (
        len(cell.params),
        f"the {len(cell.params)} parameter(s) {', '.join(cell.params)} of cell '{cell.name}'",
    )
    if count == 0:
        if params is not None and (isinstance(params, Tensor) or len(params)):
            bad_value("params", params, f"None: cell '{cell.name}' has no parameters")
        return []
    if params is None:
        bad_value("params", "None", f"{what}: a tensor (P, C) = {(count, channels)} or a tuple of tensors")
    if isinstance(params, Tensor):
        if tuple(params.shape) != (count, channels):
            bad_value(
                "params",
                params,
                f"shape (P, C) = {(count, channels)} for {what}",
                "Pass a tuple if they are not all vectors.",
            )
        _same_place("params", params, x)
        return list(params.unbind(0))
    if not isinstance(params, (tuple, list)):
        bad_type("params", params, f"a tensor (P, C) or a tuple of {count} tensors: {names}")
    if len(params) != count:
        bad_value("params", f"{len(params)} tensors", f"{count}: {what}")
    width = cell.width or channels
    allowed = {"channelwise": [(channels,)], "dense": [(channels,), (channels, channels)],
               "headwise": [(channels,), (channels // width, width, width)]}[cell.structure]  # fmt: skip
    for name, p in zip(cell.params, params, strict=True):
        if not isinstance(p, Tensor):
            bad_type(f"params: '{name}'", p, "a tensor")
        if tuple(p.shape) not in allowed:
            bad_value(f"params: '{name}'", p, " or ".join(f"shape {s}" for s in allowed))
        _same_place(f"params: '{name}'", p, x)
    return list(params)
