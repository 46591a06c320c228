"""From a step to its derivatives: check the step's rules, trace it once, prove its structure, name it by a digest.

One trace of `(states, inputs, params, cotangents) -> (new states, cotangents of states, inputs, params)` holds everything:
the Jacobian's row i is the same graph with the cotangents bound to the unit vector e_i. PyTorch does the differentiation.
Channelwise steps become a canonical scalar graph (`graph.py`); steps that mix channels run as PyTorch's own graph, with the
number of rows symbolic; kernels for headwise ones are made from a canonical graph too (`heads.py`). Traces are made on a thread for
nothing else, so the caller's autocast, inference mode, compiler or autograd state cannot leak into them.
"""

from __future__ import annotations

import copy
import functools
import hashlib
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._decomp import core_aten_decompositions
from torch.fx.experimental.proxy_tensor import make_fx

from .cell import Cell, parameter_shapes
from .errors import CellError, StructureError, bad_cell
from .garbage import uncollected
from .graph import SHRUNK, Builder, Graph, UnknownOperation, from_fx
from .heads import Sizes
from .heads import from_fx as heads_from_fx
from .rules import check_rules, line_of

Tensors = Sequence[Tensor]
_traces: dict[tuple, Trace] = {}
_lock = threading.RLock()
_decompositions: Callable[[], Any] = functools.cache(
    lambda: dict(core_aten_decompositions()) | SHRUNK
)  # slow to look through


@dataclass(frozen=True, eq=False)
class Trace:
    """The derivatives of one step at one compute dtype. Shapes: states (R..., F), F = (C,) or (H, n); any leading R.

    - `jacobian(states, inputs, params)`: A = d new / d old. Channelwise: (S, S, R..., C). Otherwise (R..., H, K, K) with
      K = S n (H = 1, n = C for a dense cell).
    - `vjp(states, inputs, params, cotangents)`: cotangents of inputs and (summed over R) of params.
    - `pull(states, inputs, params, cotangents)`: cotangents of the states.
    - `step_ops`, `jacobian_ops`: elementary operations per step, for the cost model.
    - `graph`, the canonical graph of the new states and, channelwise, the Jacobian's rows; `adjoint`, of the cotangents of states,
      inputs and params. None for a dense step, and for a headwise one that has no such graph: `obstacle` names the operation.
    - `pairs`: how many outer products g v^T each parameter's cotangent is a sum of, given as g and v each; None for a vector.
    - `turns`: the step sums over its heads, as for lengths and projections, and turns its state without forgetting it.
    - `memory`: channelwise, how much of a state at rest, with all at zero, a step leaves: the largest eigenvalue of A, in size; else 0.
    """

    digest: str
    step_ops: int
    jacobian_ops: int
    graph: Graph | None
    adjoint: Graph | None
    jacobian: Callable[[Tensors, Tensors, Tensors], Tensor]
    vjp: Callable[[Tensors, Tensors, Tensors, Tensors], tuple[list[Tensor], list[Tensor]]]
    pull: Callable[[Tensors, Tensors, Tensors, Tensors], list[Tensor]]
    pairs: tuple[int | None, ...] = ()
    obstacle: str | None = None
    turns: bool = False
    memory: float = 0.0

    @functools.cached_property
    def foreign(self) -> tuple[str, ...]:
        """Operations of the step or its derivatives that only PyTorch can run."""
        if self.obstacle is not None:
            return (self.obstacle,)
        graphs = [g for g in (self.graph, self.adjoint) if g is not None]
        return tuple(sorted({op for g in graphs for op in g.only_in_torch()}))

    @functools.cached_property
    def kinked(self) -> bool:
        """Whether the step compares its state, or has no graph to say: derivatives may be zero where it is not flat."""
        adjoint = self.adjoint
        return adjoint is None or adjoint.compares(name for name in adjoint.inputs if name[0] == "h")

    def keeps_states(self, slots: int, dtype: torch.dtype) -> bool:
        """Whether kernels keep states for backward, or find the one there is in y.

        A `dtype` shorter than what they compute in will not do where the step compares its state, for the rounding may lie beyond, nor where
        it sums over a head, as for a length: what turns adds up its roundings.
        """
        return slots > 1 or (dtype.itemsize < 4 and (self.kinked or (self.graph is not None and self.graph.sums)))

    @property
    def number(self) -> float:
        """52 bits of the digest as a float64, exactly: how the custom op hands it from forward to backward."""
        return float(int(self.digest[:13], 16))


def trace(cell: Cell, dtype: torch.dtype, device: torch.device, feature: tuple[int, ...], param_shapes: tuple) -> Trace:
    """The trace of `cell` for a compute dtype; cached, and made anew when anything that the step reads has changed.

    `feature` is (C,) or (H, n), `param_shapes` the shape of each parameter as the step sees it. Raises `CellError` or
    `StructureError`.
    """
    where = () if cell.structure == "channelwise" else (device.type, feature, param_shapes)
    key = (cell.key, dtype, cell.fingerprint(), *where)
    if key not in _traces:
        with _lock, uncollected():
            make = _trace_channelwise if cell.structure == "channelwise" else _trace_matrix
            _traces[key] = _tracer(os.getpid()).submit(make, cell, dtype, device, feature, param_shapes).result()
    return _traces[key]


def trace_of(cell: Cell, dtype: torch.dtype, device: torch.device) -> Trace:
    """A trace whose graphs are those of every shape: what kernels are made from."""
    if cell.width is None:
        return trace(cell, dtype, device, (), ())
    feature = (3 if cell.width != 3 else 4, cell.width)
    shapes = parameter_shapes(cell, feature[0] * cell.width)
    return trace(cell, dtype, device, feature, tuple(feature if len(s) == 1 else tuple(s) for s in shapes))


@functools.cache
def _tracer(process: int) -> ThreadPoolExecutor:
    """The thread that traces in this process; a fork has none yet.

    It never ends: a CUDA build of PyTorch that finds no GPU keeps a device guard in the storage of the thread that first made a fake
    tensor, and crashes at the next one if that thread is gone.
    """
    return ThreadPoolExecutor(1, "parashoot-trace")


def _random(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(*shape, generator=generator, dtype=torch.float64) * 0.8 + 0.1).to(device, dtype)


def _both_ways(cell: Cell) -> Callable[..., list[Tensor | None]]:
    """The function that is traced: new states and all cotangents."""
    slots, inputs = len(cell.states), len(cell.inputs)

    def run(*args: Tensor) -> list[Tensor | None]:
        leaves, cotangents = args[: len(args) - slots], args[len(args) - slots :]
        with torch.enable_grad():
            leaves = [a.detach().requires_grad_() for a in leaves]
            new = cell.new_states(leaves[:slots], leaves[slots : slots + inputs], leaves[slots + inputs :])
            new = [v if v.shape == h.shape else v.expand_as(h) for v, h in zip(new, leaves, strict=False)]
            pairs = [(v, g) for v, g in zip(new, cotangents, strict=True) if v.requires_grad]
            if not pairs:
                return [*new, *[None] * len(leaves)]
            grads = torch.autograd.grad([v for v, _ in pairs], leaves, [g for _, g in pairs], allow_unused=True)
        return [*(v.detach() for v in new), *grads]

    return run


# Channelwise: proved from the graph.


def _equal(a: Tensor, b: Tensor) -> bool:
    """Up to roundings of the largest."""
    size = float(b.nan_to_num(0.0, 0.0, 0.0).abs().max())
    return torch.allclose(a, b.to(a.dtype), rtol=1e-4, atol=1e-5 * max(1.0, size), equal_nan=True)


def _trace_channelwise(cell: Cell, dtype: torch.dtype, device: torch.device, feature: Any, shapes: Any) -> Trace:
    slots, inputs, params = len(cell.states), len(cell.inputs), len(cell.params)
    sizes = [(3, 5)] * (slots + inputs) + [(5,)] * params
    values = [_random(s, dtype, "cpu", 7 + k) for k, s in enumerate(sizes)]
    try:
        lines = check_rules(cell, values[:slots], values[slots : slots + inputs], values[slots + inputs :])
    except CellError as e:
        if "the step failed on arguments" in str(e):
            raise CellError(
                f"{e} If its channels mix on purpose, declare @ps.cell(structure='headwise', width=n) or 'dense'."
            ) from e
        raise
    names = [f"h{i}" for i in range(slots)] + [f"x{i}" for i in range(inputs)] + [f"p{i}" for i in range(params)]
    names += [f"g{i}" for i in range(slots)]
    graphs = []
    for shape in ((2,), (3, 5)):  # the same graph at two shapes: nothing in it depends on the shape
        arguments = [_random(shape, dtype, "cpu", k) for k in range(len(names))]
        try:
            fx = make_fx(_both_ways(cell), decomposition_table=_decompositions())(*arguments)
            graphs.append(from_fx(fx, names))
        except Exception as e:
            op, why = e.args if isinstance(e, UnknownOperation) else ("it fails", f"on states of shape {shape}: {e}")
            name = op.split(".")[1] if "." in op else None
            line = next((v for k, v in lines.items() if k.split("::")[1] == name), "")
            line = line or line_of(cell, e) or f"{cell.step.__code__.co_filename}:{cell.step.__code__.co_firstlineno}"
            raise StructureError(
                f"cell '{cell.name}' is not channelwise: {op}: {why} ({line}). Use elementwise operations only, or declare "
                "@ps.cell(structure='headwise', width=n) or @ps.cell(structure='dense')."
            ) from None
    if str(graphs[0]) != str(graphs[1]):
        problem = "the step's operations depend on the shape of its arguments"
        bad_cell(cell.name, problem, "Pass sizes in as Python numbers.")
    whole = graphs[0]
    for given in (arguments, [6 * a - 3 for a in arguments]):  # of one sign, and of both
        try:
            computed = whole.compile(dtype)(*given)
        except (RuntimeError, TypeError) as e:  # of integers, say, which a graph does not tell from numbers
            bad_cell(cell.name, f"its canonical graph does not run: {e}", "Write that operation with others.")
        if not all(v is None or _equal(_filled(u, given[0]), v) for u, v in zip(computed, fx(*given), strict=True)):
            problem = "its canonical graph computes something else than the step"
            bad_cell(cell.name, problem, "Please report it, with the step.")
    new, d_states, d_inputs, d_params = _split([slots, slots, inputs, params])
    builder = Builder(names)
    outputs = builder.inline(whole.select(new), {})
    for i in range(slots):
        outputs += builder.inline(whole.select(d_states), {f"g{k}": float(i == k) for k in range(slots)})
    both = builder.graph(outputs)
    jac_graph = both.select(range(slots, slots + slots * slots))
    run_jac, run_vjp, run_pull = (
        g.compile(dtype) for g in (jac_graph, whole.select([*d_inputs, *d_params]), whole.select(d_states))
    )
    nothing = (None,) * slots

    def jacobian(states: Tensors, xs: Tensors, ps: Tensors) -> Tensor:
        entries = run_jac(*states, *xs, *ps, *nothing)
        like = states[0]
        if slots == 1 and isinstance(entries[0], Tensor) and entries[0].shape == like.shape:
            return entries[0][None, None]
        out = like.new_empty(slots, slots, *like.shape)
        for k, a in enumerate(entries):
            out[k // slots, k % slots] = a
        return out

    def vjp(states: Tensors, xs: Tensors, ps: Tensors, cotangents: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        out = [_filled(v, states[0]) for v in run_vjp(*states, *xs, *ps, *cotangents)]
        channels = states[0].shape[-1]
        return out[:inputs], [v.reshape(-1, channels).sum(0) for v in out[inputs:]]

    def pull(states: Tensors, xs: Tensors, ps: Tensors, cotangents: Tensors) -> list[Tensor]:
        return [_filled(v, states[0]) for v in run_pull(*states, *xs, *ps, *cotangents)]

    text = f"{slots},{inputs},{params},{cell.output}\n{whole}"
    step_ops = len(whole.select(new).ops)
    adjoint = whole.select(range(slots, len(whole.outputs)))
    rest = [torch.zeros_like(v) for v in values]
    a = jacobian(rest[:slots], rest[slots : slots + inputs], rest[slots + inputs :])[..., 0, 0].double()
    memory = float(torch.linalg.eigvals(a).abs().max()) if bool(a.isfinite().all()) else 0.0
    return Trace(_digest(text), step_ops, len(jac_graph.ops), both, adjoint, jacobian, vjp, pull, memory=memory)


def _filled(v: Any, like: Tensor) -> Tensor:
    return v.expand_as(like) if isinstance(v, Tensor) else torch.full_like(like, v)


def _split(sizes: list[int]) -> list[range]:
    ends = [sum(sizes[: k + 1]) for k in range(len(sizes))]
    return [range(e - s, e) for s, e in zip(sizes, ends, strict=True)]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


# Headwise and dense: declared, and checked by perturbing one head or row and looking at the others.


def _trace_matrix(
    cell: Cell, dtype: torch.dtype, device: torch.device, feature: tuple[int, ...], shapes: tuple
) -> Trace:
    slots, inputs = len(cell.states), len(cell.inputs)
    taken = {1, *feature, *(s for shape in shapes for s in shape)}
    rows = next(p for p in (7, 11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53) if p not in taken)
    sizes = [(rows, *feature)] * (slots + inputs) + list(shapes)
    values = [_random(s, dtype, device, 7 + k) for k, s in enumerate(sizes)]
    check_rules(cell, values[:slots], values[slots : slots + inputs], values[slots + inputs :])
    _check_independence(cell, values, feature)
    cotangents = [_random((rows, *feature), dtype, device, 91 + k) for k in range(slots)]
    fx = make_fx(_both_ways(cell), tracing_mode="symbolic")(*values, *cotangents)
    for node in list(fx.graph.nodes):
        if node.op == "call_function" and node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])
    _, d_states, d_inputs, d_params = _split([slots, slots, inputs, len(shapes)])
    run_vjp, run_pull = _outputs_only(fx, [*d_inputs, *d_params]), _outputs_only(fx, list(d_states))
    width = feature[-1]
    k = slots * width

    def given(states: Tensors, xs: Tensors, ps: Tensors, cots: Tensors) -> list[Tensor]:  # laid out as traced
        flat = lambda tensors: [t.reshape(-1, *feature) for t in tensors]
        return [t.contiguous() for t in (*flat(states), *flat(xs), *ps, *flat(cots))]

    def pull(states: Tensors, xs: Tensors, ps: Tensors, cots: Tensors) -> list[Tensor]:
        out = run_pull(*given(states, xs, ps, cots))
        return [_filled(0.0 if v is None else v.reshape(states[0].shape), states[0]) for v in out]

    def vjp(states: Tensors, xs: Tensors, ps: Tensors, cots: Tensors) -> tuple[list[Tensor], list[Tensor]]:
        out = run_vjp(*given(states, xs, ps, cots))
        d_x = [_filled(0.0 if v is None else v.reshape(states[0].shape), states[0]) for v in out[:inputs]]
        return d_x, [torch.zeros_like(p) if v is None else v for p, v in zip(ps, out[inputs:], strict=True)]

    def jacobian(states: Tensors, xs: Tensors, ps: Tensors) -> Tensor:
        lead = states[0].shape[: states[0].dim() - len(feature)]
        spread = lambda ts: [t.expand(k, *t.shape) for t in ts]
        unit = torch.eye(k, dtype=dtype, device=states[0].device).view(k, slots, width)
        unit = unit.view(k, slots, *[1] * (states[0].dim() - 1), width)
        rows_of = [unit[:, i].expand(k, *states[0].shape) for i in range(slots)]
        grads = pull(spread(states), spread(xs), ps, rows_of)
        heads = feature[0] if len(feature) == 2 else 1
        stacked = torch.stack([g.reshape(k, *lead, heads, width) for g in grads], -2).flatten(-2)
        return stacked.movedim(0, -2)  # (R..., H, K_out, K_in)

    text = f"{cell.structure},{feature},{cell.output}\n{fx.graph}"
    ops = sum(n.op == "call_function" for n in fx.graph.nodes)
    canonical = _head_graphs(cell, shapes) if cell.structure == "headwise" else (None, None, (), None, False)
    graph, adjoint, pairs, obstacle, turns = canonical
    return Trace(_digest(text), max(1, ops // 4), ops * k, graph, adjoint, jacobian, vjp, pull, pairs, obstacle, turns)


def _head_graphs(
    cell: Cell, shapes: tuple
) -> tuple[Graph | None, Graph | None, tuple[int | None, ...], str | None, bool]:
    """`graph`, `adjoint`, `pairs`, `obstacle` and `turns` of a headwise trace; they depend on no size but the width."""
    slots, inputs, width = len(cell.states), len(cell.inputs), cell.width or 1
    rows, heads = [p for p in (7, 11, 13, 17, 19) if p != width and width % (7 * p)][:2]
    moving = (rows, heads, width)
    sizes = [moving] * (slots + inputs) + [(heads, *s[1:]) for s in shapes] + [moving] * slots
    roles = (("h", slots), ("x", inputs), ("p", len(shapes)), ("g", slots))
    names = [f"{role}{k}" for role, n in roles for k in range(n)]
    matrices = {f"p{k}" for k, s in enumerate(shapes) if len(s) == 3}
    values = [_random(s, torch.float64, "cpu", 7 + k) for k, s in enumerate(sizes)]
    try:
        if width == 1:
            raise UnknownOperation("a head of one channel", "it is channelwise")
        fx = make_fx(_both_ways(cell), decomposition_table=_decompositions())(*values)
        outputs = [*names[:slots], *names[: len(names) - slots]]
        whole, pairs = heads_from_fx(fx, names, Sizes(rows, heads, width), matrices, outputs)
    except Exception as e:  # PyTorch still runs what has no such graph
        why = e.args[0] if isinstance(e, UnknownOperation) else f"what ends as {type(e).__name__}"
        return None, None, (), why, False
    found = iter(_filled(v, values[0]) for v in whole.compile(torch.float64)(*values))
    for want, count in zip(fx(*values), pairs, strict=True):
        if count is None:
            got = next(found)
            got = got if want is None or want.dim() == 3 else got.sum(0)
        else:
            got = sum(
                (torch.einsum("rhi,rhj->hij", next(found), next(found)) for _ in range(count)), values[0].new_zeros(())
            )
        if want is not None and not torch.allclose(got, want):
            return None, None, (), "a canonical graph that computes something else", False
    graph, adjoint = whole.select(range(slots)), whole.select(range(slots, len(whole.outputs)))
    turns = graph.sums and _remembers(graph, values[: slots + inputs + len(shapes)], slots, inputs)
    return graph, adjoint, tuple(pairs[2 * slots + inputs :]), None, turns


def _remembers(graph: Graph, like: list[Tensor], slots: int, inputs: int) -> bool:
    """Whether a small difference of states is still there, by a tenth, after 64 steps on random inputs: about as many as kernels lead in over."""
    generator = torch.Generator().manual_seed(0)
    draw = lambda v: torch.randn(v.shape, generator=generator, dtype=v.dtype)
    run, moving = graph.compile(torch.float64), slots + inputs
    params = [0.5 * draw(v) / (v.shape[-1] ** 0.5 if v.shape[-1] == v.shape[-2] else 1.0) for v in like[moving:]]
    one = [draw(v) for v in like[:slots]]
    other = [v + 1e-6 * draw(v) for v in one]
    apart = lambda: sum(float((v - u).square().sum()) for u, v in zip(one, other, strict=True)) ** 0.5
    first = apart()
    for _ in range(64):
        xs = [draw(v) for v in like[slots:moving]]
        one, other = (
            [_filled(v, like[0]) for v in run(*states, *xs, *params, *[None] * slots)] for states in (one, other)
        )
    return apart() > 0.1 * first


def _outputs_only(fx: torch.fx.GraphModule, keep: list[int]) -> torch.fx.GraphModule:
    cut = copy.deepcopy(fx)
    output = next(n for n in cut.graph.nodes if n.op == "output")
    output.args = ([output.args[0][i] for i in keep],)
    cut.graph.eliminate_dead_code()
    cut.recompile()
    return cut


def _check_independence(cell: Cell, values: list[Tensor], feature: tuple[int, ...]) -> None:
    slots, moving = len(cell.states), len(cell.states) + len(cell.inputs)
    before, again = (cell.new_states(values[:slots], values[slots:moving], values[moving:]) for _ in range(2))
    if not all(_equal(a, b) for a, b in zip(before, again, strict=True)):
        bad_cell(cell.name, "the step gives two results on the same arguments", "Pass what varies as a ps.Input.")
    axes = [(0, "sequence", "sequences")] + ([(1, "head", "heads")] if len(feature) == 2 else [])
    for axis, one, many in axes:
        moved = []
        for k, v in enumerate(values):
            v = v.clone()
            if k < moving:
                v.select(axis, 0).add_(0.5)
            moved.append(v)
        after = cell.new_states(moved[:slots], moved[slots:moving], moved[moving:])
        for name, a, b, h in zip(cell.states, before, after, values, strict=False):
            rest = slice(1, None)
            a, b = (t.expand_as(h).movedim(axis, 0)[rest] for t in (a, b))
            if a.numel() and not torch.allclose(a, b, rtol=1e-5, atol=1e-6):
                raise StructureError(
                    f"cell '{cell.name}' is declared {cell.structure}, but its state '{name}' in one {one} depends on another: "
                    f"{many} must not mix (difference {float((a - b).abs().max()):.2g}). Declare structure='dense', or act on the "
                    f"last {'axis' if len(feature) == 1 else 'two axes'} only, with any leading axes."
                )
