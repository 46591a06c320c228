"""The one operator: every cell, solver and backend goes through `parashoot::scan` and `parashoot::scan_backward`, or straight
to the two functions behind them where nothing needs an operator.

Being an operator with fake kernels, it is opaque to `torch.compile`. Its implementation turns tensors (B, T, ...) into chunks, lets the plan's backend solve them, and turns them back.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import torch
from torch import Tensor

from .cell import Cell, feature_shape, get_cell, gradient_like, sizes
from .errors import BackendError, ConvergenceError, GradientError
from .plan import (
    MultipleShooting,
    Plan,
    Sequential,
    Solver,
    backend_for,
    compute_dtype,
    plan_for,
    tolerance_backward,
    triton_is_installed,
)
from .solve.adjoint import Cotangents, Gradients, adjoint, adjoint_by_sweeps
from .solve.layout import Layout
from .solve.linear import Algebra
from .solve.sequential import advance as advance_in_torch
from .solve.sequential import loop
from .solve.shooting import Steps, shoot
from .tiling import WIDEST, unroll_for
from .trace import Trace, trace, trace_of


def encode(solver: Solver) -> tuple[int, float, int, str, str]:
    """A solver as the operator's plain arguments: chunk length (-1 the loop, 0 auto), tol (-1 default), limit (-1 none), ..."""
    if isinstance(solver, Sequential):
        return -1, -1.0, -1, "exact", "auto"
    length = 0 if isinstance(solver.chunk_length, str) else solver.chunk_length
    tol = -1.0 if solver.tol is None else float(solver.tol)
    return length, tol, -1 if solver.max_iters is None else solver.max_iters, solver.jacobian, solver.backend


def _decode(length: int, tol: float, max_iters: int, jacobian: str, backend: str) -> Solver:
    if length == -1:
        return Sequential()
    limit = None if max_iters == -1 else max_iters
    return MultipleShooting("auto" if length == 0 else length, None if tol < 0 else tol, limit, jacobian, backend)


def _forward(
    x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None, cell: Cell, reverse: bool, all_states: bool, save: bool,
    plan: Plan, found: Trace,
) -> tuple[Tensor, Tensor, Tensor, list[float], Tensor | None]:  # fmt: skip
    """(y, h_n, saved, stats, facts): y (B, T, C) or with `all_states` (B, T, S, C); `saved` what backward needs if `save` and y is
    not enough; stats: iterations max, mean, defect, digest number, chunk length, 1 for kernels; facts (N, 3), what kernels report:
    iterations, defect and whether a limit was missed, left on the device."""
    if plan.tiling is not None:
        return _forward_by_kernels(x, params, h0, reset, cell, reverse, all_states, save, plan, found)
    with torch.autocast(x.device.type, enabled=False):
        steps, layout = _prepare(cell, x, params, reset, reverse, plan, found)
        result = shoot(steps, layout.state(h0), plan.jacobian, plan.tol, plan.max_iters, plan.lazy, plan.patience)
    ys = result.ys
    last = ys[(layout.time - 1) % layout.length, :, :, -1]
    h_n = last.flatten(2).movedim(0, 1).to(h0.dtype)
    y = layout.unchunk(ys if all_states else ys[:, cell.output : cell.output + 1], x.dtype)
    y = y if all_states else y.squeeze_(2)
    keep = save and _needs_saved(cell, x, all_states, "torch")
    saved = layout.unchunk(ys, steps.xs.dtype) if keep else steps.xs.new_empty(0)
    slowest, mean = (
        (1.0, 1.0) if plan.chunks == 1 else (float(result.iterations.max()), float(result.iterations.mean()))
    )
    stats = [slowest, mean, result.defect, found.number, float(plan.chunk_length), 0.0]
    return y, h_n.clone(memory_format=torch.contiguous_format), saved, stats, None


def _forward_by_kernels(
    x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None, cell: Cell, reverse: bool, all_states: bool, save: bool,
    plan: Plan, found: Trace,
) -> tuple[Tensor, Tensor, Tensor, list[float], Tensor]:  # fmt: skip
    from .triton.runtime import run_forward  # Triton is imported where it is used

    assert plan.tiling is not None and plan.backward is not None
    options = (reset, reverse, all_states, save, plan.tol, plan.max_iters)
    y, h_n, saved, facts = run_forward(cell, found, plan.tiling, plan.backward, x, params, h0, *options)
    if plan.max_iters is not None and bool(facts[:, 2].any()):
        raise ConvergenceError(plan.max_iters, float(facts[:, 1].max()), plan.tol, plan.chunks)
    stats = [0.0, 0.0, 0.0, found.number, float(plan.chunk_length), 1.0]
    return y if all_states else y.squeeze_(2), h_n, saved, stats, facts


@torch.library.custom_op("parashoot::scan", mutates_args=())
def scan_op(
    x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None, cell: str, reverse: bool, all_states: bool, save: bool,
    report: bool, length: int, tol: float, max_iters: int, jacobian: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`_forward` as an operator: the cell by its key, the solver as plain arguments, stats as a tensor; facts summed up if `report`, else empty."""
    solver = _decode(length, tol, max_iters, jacobian, backend)
    made = get_cell(cell)
    plan, found = plan_for(made, x, as_seen(made, params, compute_dtype(x.dtype)), solver)
    given = x.flatten(3) if plan.tiling is None else x
    y, h_n, saved, stats, facts = _forward(given, params, h0, reset, made, reverse, all_states, save, plan, found)
    seen = summary(facts) if report and facts is not None else torch.zeros(3 if report else 0, device=x.device)
    return y, h_n, saved, torch.tensor(stats, dtype=torch.float64), seen


def summary(facts: Tensor) -> Tensor:
    """Iterations at most and on average, and the largest defect, of what kernels report (N, 3): a shape that no tiling decides."""
    return torch.stack([facts[:, 0].max(), facts[:, 0].mean(), facts[:, 1].max()])


def _needs_saved(cell: Cell, x: Tensor, all_states: bool, backend: str) -> bool:
    """Whether backward needs more than y."""
    if backend == "triton":
        found = trace_of(cell, compute_dtype(x.dtype), x.device)
        return found.keeps_states(len(cell.states), x.dtype)
    return compute_dtype(x.dtype) != x.dtype or not (all_states or len(cell.states) == 1)


@scan_op.register_fake
def _(x, params, h0, reset, cell, reverse, all_states, save, report, length, tol, max_iters, jacobian, backend):
    made = get_cell(cell)
    b, t, _, c = sizes(x)
    slots = len(made.states)
    solver = _decode(length, tol, max_iters, jacobian, backend)
    kind = backend_for(made, x.dtype, x.device, solver)
    y = x.new_empty((b, t, slots, c) if all_states else (b, t, c))
    rows = -(-t // unroll_for(slots, made.width is not None)) if kind == "triton" else t
    saved = (b, rows, slots, c) if save and _needs_saved(made, x, all_states, kind) else (0,)
    return (
        y,
        h0.new_empty(h0.shape),
        x.new_empty(saved, dtype=compute_dtype(x.dtype)),
        torch.zeros(6, dtype=torch.float64),  # read by nobody but on the device "meta"
        x.new_empty(3 if report else 0, dtype=torch.float32),
    )


def _gradients(
    dy: Tensor | None, dh_n: Tensor | None, x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None, states: Tensor,
    number: float, cell: Cell, reverse: bool, solver: Solver,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients (dx, dparams in a row in the compute dtype, dh0), from what `_forward` saved and the trace's `number`."""
    plan, found = plan_for(cell, x, as_seen(cell, params, compute_dtype(x.dtype)), solver)
    if found.number != number:
        raise GradientError(
            f"cell '{cell.name}' changed between forward and backward: something its step reads (a global, a closure) "
            "has another value now. Keep it fixed until backward has run."
        )
    if plan.backward is not None:
        from .triton.runtime import run_backward

        if dy is None:
            batch, time, _, channels = sizes(x)
            dy = x.new_zeros(()).expand(batch, time, 1, channels)
        dy = dy if dy.dim() == 4 else dy.unsqueeze(2)
        tol = tolerance_backward(cell, x.dtype)
        return run_backward(cell, found, plan.backward, dy, dh_n, x, params, h0, reset, states, reverse, tol)
    with torch.autocast(x.device.type, enabled=False):
        grads, layout = _solve_backward(cell, plan, found, dy, dh_n, x.flatten(3), params, h0, reset, states, reverse)
    d_x = layout.unchunk(grads.xs, x.dtype)
    d_x = d_x if x.dim() == 4 else gradient_like(x).copy_(d_x.unflatten(3, x.shape[3:]))
    flat = torch.cat([g.flatten() for g in grads.params]) if params else h0.new_empty(0, dtype=compute_dtype(x.dtype))
    return d_x, flat, grads.h0.reshape(h0.shape[1], *h0.shape[::2]).movedim(0, 1).to(h0.dtype).contiguous()


@torch.library.custom_op("parashoot::scan_backward", mutates_args=())
def scan_backward_op(
    dy: Tensor | None, dh_n: Tensor | None, x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None, states: Tensor,
    stats: Tensor, cell: str, reverse: bool,
    length: int, tol: float, max_iters: int, jacobian: str, backend: str,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`_gradients` as an operator, which may return no views of one tensor."""
    solver = _decode(length, tol, max_iters, jacobian, backend)
    number = float(stats[3])
    return _gradients(dy, dh_n, x, params, h0, reset, states, number, get_cell(cell), reverse, solver)


def _solve_backward(
    cell: Cell, plan: Plan, found: Trace, dy: Tensor | None, dh_n: Tensor | None, x: Tensor, params: list[Tensor], h0: Tensor,
    reset: Tensor | None, states: Tensor, reverse: bool,
) -> tuple[Gradients, Layout]:  # fmt: skip
    steps, layout = _prepare(cell, x, params, reset, reverse, plan, found)
    states = states.view(x.shape[0], x.shape[1], len(cell.states), x.shape[3])
    first = h0.to(states.dtype).unsqueeze(1)
    entering = torch.cat([states[:, 1:], first] if reverse else [first, states[:, :-1]], 1)
    before = layout.chunk(entering)
    if steps.resets is not None:
        before = before.masked_fill(steps.at(steps.resets)[:, None], 0.0)
    dy = dy if dy is None or dy.dim() == 4 else dy.unsqueeze(2)
    if dy is not None and dy.shape[2] == len(cell.states):
        dys = layout.chunk(dy, pad_zero=True)
    else:
        dys = torch.zeros_like(before)
        if dy is not None:
            dys[:, cell.output] = layout.chunk(dy, pad_zero=True)[:, 0]
    end = torch.zeros_like(before[0, :, :, 0]) if dh_n is None else layout.state(dh_n)
    cots = Cotangents(dys, end, layout.tail)
    grads = None
    if plan.lazy is not None or (plan.jacobian != "exact" and cell.structure != "channelwise"):
        grads = adjoint_by_sweeps(steps, before, cots, plan.lazy or plan.tol, 3 if plan.lazy else None)
    if grads is None:
        grads = adjoint(steps, before, cots)
    if grads is None:  # a chunk's Jacobian product overflowed: sweep the whole sequence in order
        plan = replace(plan, chunk_length=x.shape[1], chunks=1)
        return _solve_backward(cell, plan, found, dy, dh_n, x, params, h0, reset, states, reverse)
    return grads, layout


def _setup_context(ctx, inputs, output) -> None:
    x, params, h0, reset, cell, reverse, all_states, save, _, *solver = inputs
    y, _, saved, stats, facts = output
    ctx.mark_non_differentiable(saved, stats, facts)
    ctx.set_materialize_grads(False)
    made = get_cell(cell)
    kind = backend_for(made, x.dtype, x.device, _decode(*solver))
    ctx.save_for_backward(x, h0, reset, saved if _needs_saved(made, x, all_states, kind) else y, stats, *params)
    ctx.options, ctx.save = (cell, reverse, *solver), save


def _backward(ctx, dy, dh_n, _saved, _stats, _facts):
    x, h0, reset, states, stats, *params = ctx.saved_tensors
    if not ctx.save:
        raise GradientError(
            "backward through a scan that ran without gradients enabled. Call ps.scan under torch.enable_grad()."
        )
    nothing = [None] * 11
    if dy is None and dh_n is None:
        return None, [None] * len(params), None, *nothing
    d_x, flat, d_h0 = scan_backward_op(dy, dh_n, x, params, h0, reset, states, stats, *ctx.options)
    return d_x, _apart(flat, params), d_h0, *nothing


def _apart(flat: Tensor, params: list[Tensor]) -> list[Tensor]:
    """Gradients in a row as those of `params`, each of its shape and dtype."""
    parts = flat.split([p.numel() for p in params])
    return [g.view(p.shape).to(p.dtype) for g, p in zip(parts, params, strict=True)]


scan_op.register_autograd(_backward, setup_context=_setup_context)


@scan_backward_op.register_fake
def _(dy, dh_n, x, params, h0, *rest):
    return (
        gradient_like(x),
        x.new_empty(sum(p.numel() for p in params), dtype=compute_dtype(x.dtype)),
        h0.new_empty(h0.shape),
    )


def _no_second_derivative(ctx, *grads):
    raise GradientError(
        "ps.scan was differentiated twice; it provides first derivatives only. Differentiate cell.step in a loop instead."
    )


scan_backward_op.register_autograd(_no_second_derivative, setup_context=lambda ctx, inputs, output: None)


class _Direct(torch.autograd.Function):
    """The same two functions without the operator, whose dispatch costs more than a short sequence takes."""

    @staticmethod
    def forward(ctx, facts: list, cell, reverse, all_states, save, solver, planned, x, h0, reset, *params):  # type: ignore[override]
        options = (reset, cell, reverse, all_states, save, *planned)
        y, h_n, saved, stats, reported = _forward(x, list(params), h0, *options)
        facts.extend([*stats, reported])
        if save:
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(x, h0, reset, saved if saved.dim() > 1 else y, *params)
            ctx.options = stats[3], cell, reverse, solver
        return y, h_n

    @staticmethod
    def backward(ctx, dy, dh_n):  # type: ignore[override]
        x, h0, reset, states, *params = ctx.saved_tensors
        number, cell, reverse, solver = ctx.options
        if dy is None and dh_n is None:
            return (None,) * (10 + len(params))
        if (
            torch.is_grad_enabled()
        ):  # create_graph: through the operator, which refuses a second derivative when asked for it
            stats = torch.tensor([0.0, 0.0, 0.0, number], dtype=torch.float64)
            options = (cell.key, reverse, *encode(solver))
            d_x, flat, d_h0 = scan_backward_op(dy, dh_n, x, params, h0, reset, states, stats, *options)
        else:
            d_x, flat, d_h0 = _gradients(dy, dh_n, x, params, h0, reset, states, *ctx.options)
        return *[None] * 7, d_x, d_h0, None, *_apart(flat, params)


def run(
    x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None, cell: Cell, reverse: bool, all_states: bool,
    solver: Solver, report: bool,
) -> tuple[Tensor, Tensor, Tensor | list[float], Tensor | None]:  # fmt: skip
    """(y, h_n, stats, facts or their summary), directly on plain tensors, through the operator when compiling or on tensor subclasses."""
    if x.dim() == 5 and (x.shape[4] % WIDEST or WIDEST % (cell.width or 1)):  # tiles lie in one head of x each
        x = x.flatten(3)
    save = torch.is_grad_enabled() and any(t.requires_grad for t in (x, h0, *params))
    if torch.compiler.is_compiling() or x.is_meta or type(x) not in (Tensor, torch.nn.Parameter):
        options = (cell.key, reverse, all_states, save, report, *encode(solver))
        y, h_n, _, stats, facts = scan_op(x, params, h0, reset, *options)
        return y, h_n, stats, facts
    _begin(x.device.type)
    plan, found = plan_for(cell, x, as_seen(cell, params, compute_dtype(x.dtype)), solver)
    x = x.flatten(3) if plan.tiling is None else x
    autocast = torch.is_autocast_enabled(x.device.type)  # it would reach a backward pass run inside it
    if plan.autograd and not autocast:
        stats = [1.0, 1.0, 0.0, found.number, float(plan.chunk_length), 0.0]
        return *_looped(x, params, h0, reset, cell, reverse, all_states), stats, None
    if torch._C._are_functorch_transforms_active():
        raise GradientError(
            "ps.scan under torch.func.grad, vmap or their like, which it does not provide. Call torch.autograd.grad on its result."
        )
    if torch.jit.is_tracing():
        raise BackendError("torch.jit.trace cannot record ps.scan. Use torch.export or torch.compile.")
    facts = []
    y, h_n = _Direct.apply(facts, cell, reverse, all_states, save, solver, (plan, found), x, h0, reset, *params)  # type: ignore[misc]
    *stats, reported = facts
    return y, h_n, stats, reported


@functools.cache
def _begin(device: str) -> None:
    """Begin with what the first kernel of this process would wait for after the first trace."""
    if device == "cuda" and triton_is_installed():
        from .triton.compiling import hashing

        hashing()


def advance(cell: Cell, state: Tensor, inputs: Tensor, params: list[Tensor], inplace: bool) -> Tensor:
    """One step: state (B, S, C), inputs (B, G, C) -> the new state in the state's dtype, or `state` itself, overwritten.

    One kernel, which a CUDA graph may capture, where no gradient is wanted.
    """
    wanted = torch.is_grad_enabled() and any(t.requires_grad for t in (state, inputs, *params))
    plain = not (wanted or torch.compiler.is_compiling())
    if plain and cell.width is None and backend_for(cell, inputs.dtype, inputs.device, MultipleShooting()) == "triton":
        from .triton.runtime import run_decode

        out = state if inplace else torch.empty_like(state)
        found = trace(cell, compute_dtype(inputs.dtype), inputs.device, (), ())
        run_decode(cell, found, state, inputs, params, out)
        return out
    dtype = compute_dtype(inputs.dtype)
    with torch.autocast(inputs.device.type, enabled=False):
        new = advance_in_torch(cell, state.to(dtype), inputs.to(dtype), [p.to(dtype) for p in params])
    return state.copy_(new) if inplace else new.to(state.dtype)


def _looped(
    x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None, cell: Cell, reverse: bool, all_states: bool
) -> tuple[Tensor, Tensor]:
    dtype = compute_dtype(x.dtype)
    given = [p.to(dtype) for p in params]
    y, h_n = loop(cell, x.to(dtype), given, h0.to(dtype), reset=reset, reverse=reverse, return_states=all_states)
    return y.to(x.dtype), h_n.to(h0.dtype, copy=True)  # a step may return its input


def as_seen(cell: Cell, params: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """Parameters in the compute dtype, vectors of a headwise cell as (H, n)."""
    return [p.to(dtype).unflatten(0, (-1, cell.width)) if cell.width and p.dim() == 1 else p.to(dtype) for p in params]


def _prepare(
    cell: Cell, x: Tensor, params: list[Tensor], reset: Tensor | None, reverse: bool, plan: Plan, found: Trace
) -> tuple[Steps, Layout]:
    feature = feature_shape(cell, x.shape[-1])
    layout = Layout(x, plan.chunk_length, feature, reverse)
    algebra = Algebra(len(cell.states), feature, cell.structure != "channelwise")
    resets = None if reset is None else layout.mask(reset)
    seen = as_seen(cell, params, compute_dtype(x.dtype))
    return Steps(cell, found, algebra, layout.chunk(x), seen, resets, plan.window), layout
