"""Does it agree with the loop, and why does it converge: `verify` measures both, on the user's own cell and data."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from .cell import Cell, feature_shape, parameter_shapes
from .errors import bad_type
from .op import as_seen
from .plan import SHORTEST_KERNEL_CHUNK, MultipleShooting, Solver, check_solver, compute_dtype, plan_for, trace_for
from .scan import check_arguments, scan
from .solve.linear import Algebra
from .solve.sequential import loop

BOUNDS = {  # storage dtype: (absolute, relative to |y|) agreement asked of outputs; relative agreement of gradients
    torch.float64: (1e-10, 0.0, 1e-8),
    torch.float32: (1e-5, 0.0, 1e-4),
    torch.bfloat16: (5e-4, 2**-8, 2**-5),
    torch.float16: (1e-4, 2**-10, 2**-7),
}


@dataclass(frozen=True)
class Report:
    """What `verify` found; prints as a table, `to_dict()` gives the numbers.

    Errors are against the fp64 loop on the same numbers; `loop_*` are those of the plain loop in x's own dtype. `lyapunov` is the
    largest Lyapunov exponent per step over channels or heads, estimated from the step Jacobians: below 0 nearby states come together,
    and parallel solution is cheap unless the cell latches; above 0 it is chaotic. NaN where it was not measured.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    output_error: float
    loop_output_error: float
    gradient_error: float
    loop_gradient_error: float
    iterations: int
    defect: float
    chunk_length: int
    lyapunov: float
    passed: bool

    def to_dict(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

    def __str__(self) -> str:
        rows = []
        for f in fields(self):
            value = getattr(self, f.name)
            rows.append((f.name.replace("_", " "), f"{value:.3g}" if isinstance(value, float) else str(value)))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:{width}}  {value}" for name, value in rows)


def verify(
    cell_or_layer: Any,
    x: Tensor,
    params: Tensor | Sequence[Tensor] | None = None,
    h0: Tensor | None = None,
    *,
    solver: Solver | None = None,
    seed: int = 0,
) -> Report:
    """Compare the parallel solution of a cell or layer with the fp64 loop, for outputs and for all gradients.

    - a cell: `x` (B, T, G, C), `params` and `h0` as in `ps.scan`; params None draws them, 0.5 N(0, 1) (matrices over sqrt n).
    - a layer (`ps.RNN` and its kin): `x` (B, T, D); its own solver and parameters.
    - `solver`, or a layer's own: where it leaves the chunk length open and would run the loop itself, up to eight chunks of at least 16
      steps are compared instead; below 32 steps, the loop.

    The loss is a random weighting of the outputs. Raises as `ps.scan` does.
    """
    if isinstance(cell_or_layer, Cell):
        return _verify_cell(cell_or_layer, x, params, h0, check_solver(solver), seed)
    if isinstance(cell_or_layer, nn.Module) and hasattr(cell_or_layer, "_scan"):
        return _verify_layer(cell_or_layer, x, seed)
    bad_type("cell_or_layer", cell_or_layer, "a cell (@ps.cell) or a recurrent layer (ps.RNN, ps.ParaGRU, ps.ParaLSTM)")


def _verify_cell(cell: Cell, x: Tensor, params: Any, h0: Tensor | None, solver: Solver, seed: int) -> Report:
    x = x.flatten(3) if isinstance(x, Tensor) and x.dim() == 5 else x
    if params is None and isinstance(x, Tensor) and x.dim() == 4:
        generator = torch.Generator().manual_seed(seed)
        kind = compute_dtype(x.dtype)
        params = tuple(
            (torch.randn(s, generator=generator) * 0.5 / (s[-1] ** 0.5 if len(s) > 1 else 1.0)).to(x.device, kind)
            for s in parameter_shapes(cell, x.shape[3])
        )  # fmt: skip
    given = check_arguments(cell, x, params if isinstance(params, Tensor) or params else None, h0, None)
    start = x.new_zeros(x.shape[0], len(cell.states), x.shape[3]) if h0 is None else h0
    solver = _in_chunks(cell, x, given, solver)
    info = scan(cell, x.detach(), given or None, start.detach(), solver=solver, return_info=True)[2]

    def parallel(x: Tensor, start: Tensor, *ps: Tensor) -> Tensor:
        return scan(cell, x, list(ps) or None, start, solver=solver)[0]

    def plain(x: Tensor, start: Tensor, *ps: Tensor) -> Tensor:
        return loop(cell, x, list(ps) or None, start)[0]

    leaves, narrow = [x, start, *given], x.dtype in (torch.bfloat16, torch.float16)
    own = [v.float() for v in leaves] if narrow else leaves
    found = _compare(parallel, plain, leaves, own, x.dtype, seed)
    exponent = lyapunov_exponents(cell, x, given or None, start)
    return _report(cell.name, x, found, info, float(exponent.max()))


def _in_chunks(cell: Cell, x: Tensor, params: Sequence[Tensor], solver: Solver) -> Solver:
    """`solver`, with chunks where it would run the loop and has not been asked to, so that there is something to compare with it."""
    if not isinstance(solver, MultipleShooting) or not isinstance(solver.chunk_length, str):
        return solver
    plan = plan_for(cell, x, as_seen(cell, list(params), compute_dtype(x.dtype)), solver)[0]
    if plan.chunks > 1 or x.shape[1] < 2 * SHORTEST_KERNEL_CHUNK:
        return solver
    return replace(solver, chunk_length=max(SHORTEST_KERNEL_CHUNK, -(-x.shape[1] // 8)))


def _verify_layer(layer: Any, x: Tensor, seed: int) -> Report:
    names = [n for n, _ in layer.named_parameters()]
    infos: list[Any] = []

    def recording(cell: Any, x: Tensor, params: Any, *args: Any, solver: Any = None, **options: Any) -> Any:
        solver = _in_chunks(cell, x, params or (), check_solver(solver))
        *result, info = scan(cell, x, params, *args, solver=solver, return_info=True, **options)
        infos.append(info)
        return tuple(result)

    def looped(cell: Any, x: Tensor, *args: Any, solver: Any = None, **options: Any) -> Any:
        y, final = loop(cell, x.flatten(3).to(compute_dtype(x.dtype)), *args, **options)
        return y.to(x.dtype), final

    def runner(run_scan: Callable) -> Callable[..., Tensor]:
        def run(x: Tensor, *ps: Tensor) -> Tensor:
            twin = copy.deepcopy(layer).eval()
            twin._scan = run_scan
            return torch.func.functional_call(twin, dict(zip(names, ps, strict=True)), (x,))[0]

        return run

    leaves = [x, *(p.detach() for p in layer.parameters())]
    found = _compare(runner(recording), runner(looped), leaves, leaves, x.dtype, seed)
    slowest = max(infos, key=lambda info: info.iterations)
    return _report(type(layer).__name__, x, found, slowest, math.nan)


def _compare(
    parallel: Callable, plain: Callable, leaves: list[Tensor], own: list[Tensor], dtype: torch.dtype, seed: int
) -> dict[str, Any]:
    """Errors of `parallel`, and of `plain` on `own`, against `plain` in fp64."""
    generator = torch.Generator().manual_seed(seed)
    exact = _run(plain, [v.double() for v in leaves], generator)
    ours, theirs = _run(parallel, leaves, generator.manual_seed(seed)), _run(plain, own, generator.manual_seed(seed))
    absolute, relative, gradient = BOUNDS[dtype]
    error, loop_error = ((run[0].double() - exact[0]).abs() for run in (ours, theirs))
    errors = lambda run: [relative_error(got, want) for got, want in zip(run[1], exact[1], strict=True)]
    g_error, g_loop = (float(torch.tensor(errors(run), dtype=torch.float64).max()) for run in (ours, theirs))  # or NaN
    allowed = torch.maximum(absolute + relative * exact[0].abs(), 2 * loop_error.max())
    return {
        "output_error": float(error.max()), "loop_output_error": float(loop_error.max()),
        "gradient_error": g_error, "loop_gradient_error": g_loop,
        "passed": bool((error <= allowed).all()) and g_error <= max(gradient, 2 * g_loop),
    }  # fmt: skip


def _run(f: Callable, leaves: list[Tensor], generator: torch.Generator) -> tuple[Tensor, list[Tensor]]:
    leaves = [v.detach().requires_grad_() for v in leaves]
    with torch.enable_grad():
        y = f(*leaves)
        weights = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y)
        grads = torch.autograd.grad(y, leaves, weights, allow_unused=True)
    return y.detach(), [torch.zeros_like(v) if g is None else g for v, g in zip(leaves, grads, strict=True)]


def relative_error(got: Tensor, want: Tensor) -> float:
    scale = float(want.abs().max())
    return float((got.double() - want).abs().max()) / (scale if scale > 0 else 1.0)


def _report(name: str, x: Tensor, found: dict[str, Any], info: Any, exponent: float) -> Report:
    return Report(
        name=name, shape=tuple(x.shape), dtype=str(x.dtype).removeprefix("torch."), **{k: v for k, v in found.items() if k != "passed"},
        iterations=info.iterations, defect=info.defect, chunk_length=info.chunk_length, lyapunov=exponent, passed=found["passed"],
    )  # fmt: skip


def lyapunov_exponents(cell: Cell, x: Tensor, params: Any = None, h0: Tensor | None = None) -> Tensor:
    """The largest Lyapunov exponent along a trajectory: lim (1/T) log |J_T ... J_1 v| for a random v.

    Arguments as in `ps.scan`. Returns (B, C) for a channelwise cell, (B, H) for a headwise, (B, 1) for a dense one; computed in
    fp64. Source: Benettin et al. 1980.
    """
    if not isinstance(x, Tensor):
        bad_type("x", x, "a tensor (B, T, G, C)")
    x = (x.flatten(3) if x.dim() == 5 else x).detach().double()
    given = [p.detach().double() for p in check_arguments(cell, x, _doubled(params), _doubled(h0), None)]
    with torch.no_grad():
        start = x.new_zeros(x.shape[0], len(cell.states), x.shape[3]) if h0 is None else h0.detach().double()
        states = scan(cell, x, given or None, start, return_states=True)[0]
        feature = feature_shape(cell, x.shape[3])
        algebra = Algebra(len(cell.states), feature, cell.structure != "channelwise")
        seen = as_seen(cell, given, torch.float64)
        found = trace_for(cell, x, seen)
        split = lambda v: v.reshape(*v.shape[:-1], *feature)
        v = split(torch.randn(start.shape, generator=torch.Generator().manual_seed(0), dtype=x.dtype).to(x)).movedim(
            1, 0
        )
        axes = (0,) if not algebra.full else (0, v.dim() - 1)
        v = v / v.norm(dim=axes, keepdim=True)
        total = 0.0
        for t in range(x.shape[1]):
            before = start if t == 0 else states[:, t - 1]
            jacobian = found.jacobian(split(before).unbind(1), split(x[:, t]).unbind(1), seen)
            v = algebra.apply(jacobian, v)
            size = v.norm(dim=axes, keepdim=True).clamp_min(1e-300)
            total = total + size.log()
            v = v / size
        exponents = (total / x.shape[1]).squeeze(0)  # type: ignore[union-attr]
        return exponents.squeeze(-1) if algebra.full and len(feature) == 2 else exponents


def _doubled(value: Any) -> Any:
    if value is None:
        return None
    return value.detach().double() if isinstance(value, Tensor) else [p.detach().double() for p in value]
