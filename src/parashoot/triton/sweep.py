"""From a traced cell to the source of its kernels: what a forward and a backward sweep load, compute and store at each position.

Forward: the carry is the state, v <- f(v, x_t). Stores y and, for cells of several slots and where y is too short, all states once every
`unroll` positions in fp32. Backward: the carry is the gradient by the state, v <- A_t^T (v + dy_t). Loads x, dy and the states that entered
each step (of one slot the stored output of the step before; of several, computed again from the saved ones), stores dx and sums
parameter gradients in order.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..cell import Cell
from ..errors import BackendError, bad_value
from ..graph import Atom, Graph
from ..tiling import stages_for, unroll_for
from ..trace import Trace, trace_of
from . import head_skeleton
from .emit import atom, call, dot, function
from .skeleton import CORRECT, LOOP, NEARER, PATIENCE, PLACE, RUN, SHOOT, fill

HEADER = """import triton
import triton.language as tl

from parashoot.triton.functions import (
    above, atan2, clamped, cos, difference, divided, erf, exp, expm1, finite, full, hypot, larger, log, log1p, rsqrt, sigmoid, sign, sin, smaller,
    sqrt, tanh,
)

"""

HEAD_FUNCTIONS = "from parashoot.triton.functions import mixed, outer, totalled\n\n"


@dataclass(frozen=True)
class Source:
    """What a module of kernels depends on.

    `graph`: new states and, channelwise, the Jacobian's rows; `adjoint`: cotangents of states, inputs and params; `outputs`: the
    slots that y carries; `unroll`: positions a loop trip; `stages`: trips loaded ahead; `reset`: a mask is read; `save`: states are
    stored; `width` of a head, None for a channelwise step; `pairs`: outer products in the cotangent of each parameter of a headwise
    step, None for a vector; `kinked`: the step compares its state.
    """

    graph: Graph
    adjoint: Graph
    slots: int
    inputs: int
    params: int
    outputs: tuple[int, ...]
    unroll: int
    stages: int
    reset: bool
    save: bool
    width: int | None
    pairs: tuple[int | None, ...]
    kinked: bool

    @property
    def step(self) -> Graph:
        """New states only."""
        return self.graph.select(range(self.slots))

    @property
    def arguments(self) -> list[str]:
        """Names of the step's arguments."""
        moving = [f"{role}{k}" for role, n in (("h", self.slots), ("x", self.inputs)) for k in range(n)]
        return [*moving, *self.constants]

    def given(self, states: list[str], u: int) -> list[str]:
        """What a generated function is called with at position u of a trip."""
        return [
            *states,
            *[f"x{u}_{g}.to(tl.float32)" for g in range(self.inputs)],
            *self.constants,
        ]

    @property
    def matrices(self) -> list[int]:
        """Which parameters are matrices."""
        return [k for k, n in enumerate(self.pairs) if n is not None]

    @property
    def constants(self) -> list[str]:
        """What every position is computed with: parameters, of matrices the transpose too, and how a tile holds heads."""
        names = [f"p{k}{t}" for k in range(self.params) for t in ("", "_t")[: 1 + (k in self.matrices)]]
        return names if self.width is None else [*names, "inside", "same"]

    @property
    def flags(self) -> list[str]:
        """Constants of the compiler that generated functions take."""
        return ["FAST"] if self.width is None else ["FAST", "MASKED", "APART"]


@functools.lru_cache(maxsize=512)
def source_of(found: Trace, cell: Cell, unroll: int, stages: int, all_states: bool, reset: bool, save: bool) -> Source:
    """What the kernels for a trace and these options are made from; `save`: as `Trace.keeps_states` says, where backward follows."""
    assert found.graph is not None and found.adjoint is not None
    slots = len(cell.states)
    outputs = tuple(range(slots)) if all_states else (cell.output,)
    sizes = (slots, len(cell.inputs), len(cell.params))
    return Source(
        found.graph, found.adjoint, *sizes, outputs, unroll, stages, reset, save, cell.width, found.pairs, found.kinked
    )


def text(cell: Cell, direction: str, reset: bool, return_states: bool) -> str:
    """The source of the kernels of a channelwise or headwise cell for float32; `direction` is "forward", "backward" or, channelwise, "decode"."""
    printers = {"forward": forward, "backward": backward, "decode": decode}
    if direction not in printers:
        bad_value("direction", repr(direction), "'forward', 'backward' or 'decode'")
    if cell.structure == "dense" or (cell.structure == "headwise" and direction == "decode"):
        kinds = "channelwise cells" if direction == "decode" else "channelwise and headwise cells"
        raise BackendError(f"cell '{cell.name}' is {cell.structure}; such kernels are generated for {kinds}.")
    found = trace_of(cell, torch.float32, torch.device("cpu"))
    if found.foreign:
        raise BackendError(f"cell '{cell.name}' uses {', '.join(found.foreign)}, which has no kernel expression.")
    sizes = len(cell.states), cell.width is not None
    kept = found.keeps_states(sizes[0], torch.float32)
    made = source_of(found, cell, unroll_for(*sizes), stages_for(*sizes), return_states, reset, kept)
    return printers[direction](made)


X_PLACE = ["x_b", "x_t", "x_g", "x_h", "x_c", "width"]
IN_HEADS = [  # the channels of x lie in heads of `width`, those of a tile in one of them: from its base the others lie in a row
    "head = (tile * BD // width).to(tl.int64) if WIDE else tile * BD // width",
    "x_head = x_ptr + b * x_b + head * (x_h - width * x_c)",
]


def _place_in_heads(s: Source) -> list[str]:
    return IN_HEADS if s.width is None else [line.replace("BD", "USED") for line in IN_HEADS]


def forward(s: Source) -> str:
    """The module with `forward_shoot` and `forward_correct`, as text."""
    carry = [f"v{i}" for i in range(s.slots)]

    def loads(apart: bool, unroll: int) -> list[str]:
        boundary = "(q >= r_shift) & (q < L)"
        return [line for u in range(unroll) for line in [*_position(u), *_load_inputs(s, u, apart, boundary)]]

    def steps(jacobian: bool, write: bool, unroll: int) -> list[str]:
        out = _snapshot(s) if write and not jacobian else []
        for u in range(unroll):
            out += [*_position(u), *_cut(s, u, carry, jacobian)]
            if s.save and write and u == 0:
                out.append(
                    f"at = saved_ptr + ((b * groups + (origin + t) // {s.unroll}) * {s.slots}) * C + col + 0 * row"
                )
                due = _mask(False) if unroll == s.unroll else f"mask=ok & ((origin + t) % {s.unroll} == 0)"
                out += [f"tl.store(at + {i} * C, v{i}, {due})" for i in range(s.slots)]
            name, graph = ("step_and_jacobian", s.graph) if jacobian else ("step", s.step)
            line, values = call(name, graph, s.given(carry, u), "w", s.flags)
            out.append(line)
            if jacobian:
                rows = [values[s.slots + i * s.slots :][: s.slots] for i in range(s.slots)]
                out += _compose_step(rows)
            out += _carry_on(s, values[: s.slots], write)
            if write:
                out.append("at = y_ptr + b * y_b + time * y_t + col")
                out += [
                    f"tl.store(at + {n} * C, v{i}.to(y_ptr.dtype.element_ty), {_mask(False)})"
                    for n, i in enumerate(s.outputs)
                ]
        return out

    arguments = ["x_ptr", *_param_pointers(s), "h_ptr", "y_ptr", "end_ptr"]
    arguments += ["saved_ptr", "groups"] * s.save + ["reset_ptr", "r_b", "r_t", "r_shift"] * s.reset
    arguments += [*X_PLACE, "y_b", "y_t"]
    functions = [function("step", s.step, s.arguments, s.flags)]
    if s.width is None:
        functions.append(function("step_and_jacobian", s.graph, s.arguments))
    setup = [*_place_in_heads(s), *_load_params(s), *_load_entering("h_ptr", s.slots)]
    return _module("forward", s, functions, arguments, setup, [], _store_end(s.slots), [], loads, steps)


def backward(s: Source) -> str:
    """The module with `backward_shoot` and `backward_correct`, as text."""
    slots, last, recompute = range(s.slots), s.unroll - 1, s.save
    entries = s.graph.select(range(s.slots, s.slots + s.slots**2)) if s.width is None else None
    pull = s.adjoint.select(slots)
    carry = [f"v{i}" for i in slots]

    def loads(apart: bool, unroll: int) -> list[str]:
        out = []
        for u in range(unroll):
            out += [*_position(u), *_load_inputs(s, u, apart, "(q >= LO) & (q < L - r_shift)")]
            out.append("at = dy_ptr + b * dy_b + time * dy_t + col")
            out += [f"g{u}_{n} = tl.load({_apart('at', 'dy_s', n)}, {_mask(apart)})" for n in range(len(s.outputs))]
            if not recompute:  # the state before: y one position on, in the order of this sweep
                there = "ok & (q < L - 1)" if apart else "ok & (q < L - 1) if MASKED else q < L - 1"
                out += [
                    "at = y_ptr + b * y_b + (time + DIR) * y_t + col",
                    f"h{u} = tl.load(at, mask={there}, other=0.0)",
                ]
        if recompute:
            group = f"(L - {s.unroll} - origin - t) // {s.unroll}"
            out.append(f"at = saved_ptr + ((b * groups + {group}) * {s.slots}) * C + col")
            out += [f"saved{i} = tl.load(at + {i} * C, {_mask(apart)})" for i in slots]
        return out

    def entering(unroll: int) -> list[str]:
        """f{u}_{i}, the states that enter the step at position u; the last position of the trip is the earliest in time."""
        out = []
        for u in reversed(range(unroll)):
            names = [f"f{u}_{i}" for i in slots]
            if not recompute:
                out.append(f"q = origin + t + {u}")
                out.append(f"{names[0]} = tl.where(q >= L - 1, h_first, h{u}.to(tl.float32))")
            elif u == last:
                out += [f"{names[i]} = saved{i}" for i in slots]
            else:
                line, values = call("step", s.step, s.given([f"f{u + 1}_{i}" for i in slots], u + 1), "w", s.flags)
                out += [line, *[f"{names[i]} = {_spread(values[i])}" for i in slots]]
            out += _cut(s, u, names, False)
        return out

    def steps(jacobian: bool, write: bool, unroll: int) -> list[str]:
        out = entering(unroll)
        if write and not jacobian:
            out += _snapshot(s)
        for u in range(unroll):
            out += _position(u)
            for n, i in enumerate(s.outputs):
                value = f"g{u}_{n}.to(tl.float32)"
                out.append(f"v{i} += tl.where(ok, {value}, 0.0) if MASKED else {value}")
            given = s.given([f"f{u}_{i}" for i in slots], u)
            if jacobian and entries is not None:
                line, values = call("jacobian", entries, given, "w")
                transposed = [[values[k * s.slots + i] for k in slots] for i in slots]
                out += [line, *_compose_step(transposed)]
            if write:
                line, values = call("adjoint", s.adjoint, [*given, *carry], "w", s.flags)
                out += [line, "at = dx_head + time * dx_t + col"]
                for g, v in enumerate(values[s.slots :][: s.inputs]):
                    stored = f"{_spread(v)}.to(dx_ptr.dtype.element_ty)"
                    out.append(f"tl.store({_apart('at', 'dx_g', g)}, {stored}, {_mask(False)})")
                out += _sum_up(s, values[s.slots + s.inputs :])
                new = values[: s.slots]
            elif entries is None:
                line, new = call("pull", pull, [*given, *carry], "w", s.flags)
                out.append(line)
            else:
                out += [f"u{i} = {dot((transposed[i][k], f'v{k}') for k in slots)}" for i in slots]
                new = [f"u{i}" for i in slots]
            out += [*_carry_on(s, new, write), *_cut(s, u, carry, jacobian)]
        return out

    arguments = ["x_ptr", *_param_pointers(s)]
    arguments += ["saved_ptr", "groups"] if recompute else ["h_ptr", "y_ptr", "y_b", "y_t"]
    arguments += ["dy_ptr", "dh_ptr", "dx_ptr", "dp_ptr", "end_ptr"]
    arguments += ["reset_ptr", "r_b", "r_t", "r_shift"] * s.reset
    arguments += [*X_PLACE, "dy_b", "dy_t", "dy_s", "dx_b", "dx_t", "dx_g", "dx_h"]
    setup = [*_place_in_heads(s), "dx_head = dx_ptr + b * dx_b + head * (dx_h - width)", *_load_params(s)]
    setup += ["if dh_ptr is None:", *(f"    i{i} = zero" for i in slots)]
    setup += ["else:", *(f"    {line}" for line in _load_entering("dh_ptr", s.slots))]
    given = [*s.arguments, *[f"g{i}" for i in slots]]
    linear = function("pull", pull, given, s.flags) if entries is None else function("jacobian", entries, s.arguments)
    functions = [linear, function("adjoint", s.adjoint, given, s.flags)]
    if recompute:
        functions.insert(0, function("step", s.step, s.arguments, s.flags))
    else:
        setup.append("h_first = tl.load(h_ptr + b * C + col, mask=inside, other=0.0).to(tl.float32)")
    clear, sums, blank = _channel_sums(s) if s.width is None else _head_sums(s)
    finish = [*_store_end(s.slots), *sums]
    return _module("backward", s, functions, arguments, setup, clear, finish, blank, loads, steps)


def _sum_up(s: Source, values: list[Atom]) -> list[str]:
    """Parameter gradients of one position, added to the sums a{k}."""
    out, rest = [], iter(values)
    for k, n in enumerate(s.pairs or [None] * s.params):
        if n is None:
            v = atom(next(rest))
            out.append(f"a{k} += tl.where(ok, {v}, 0.0) if MASKED else {v}")
        for _ in range(n or 0):
            out.append(f"a{k} = outer(a{k}, {atom(next(rest))}, {atom(next(rest))}, ok, FAST, MASKED)")
    return out


def _channel_sums(s: Source) -> tuple[list[str], list[str], list[str]]:
    """Lines that clear the sums, store them, and blank those of other parts."""
    sums = []
    blank = [
        f"for other in range({s.params}, parts * {s.params}):",
        f"    at = dp_ptr + (b * parts * {s.params} + other) * C + tile * BD + tl.arange(0, BD)",
        "    tl.store(at, tl.zeros([BD], tl.float32), mask=tile * BD + tl.arange(0, BD) < C)",
    ]
    for k in range(s.params):
        sums += [
            f"at = dp_ptr + ((b * parts + part) * {s.params} + {k}) * C + tile * BD + tl.arange(0, BD)",
            "there = tile * BD + tl.arange(0, BD) < C",
            f"tl.store(at, tl.sum(tl.where(live, a{k}, 0.0), 0), mask=there)",
        ]
    return [f"a{k} = zero" for k in range(s.params)], sums, blank if s.params else []


def _head_sums(s: Source) -> tuple[list[str], list[str], list[str]]:
    """The same: vectors (C,) and matrices (H, n, n) follow one another in the line of `slot`; others of `parts` lines are zero."""
    clear, sums = [], []
    before, total = "0", " + ".join("WIDTH" if k in s.matrices else "1" for k in range(s.params)) or "0"
    for k in range(s.params):
        at = f"dp_ptr + ((slot + part) * ({total}) + {before}) * C.to(tl.int64)"
        if k in s.matrices:
            clear.append(f"a{k} = tl.zeros([BD, BD], tl.float32)")
            at, value, mask = f"{at} + {_MATRIX}", f"a{k}", "same & (tile * USED + k < C)"
        else:
            clear.append(f"a{k} = zero")
            at, value, mask = f"{at} + col", f"tl.sum(a{k}, 0)[None, :]", "(col < C) & (lane < USED)"
        sums += [f"tl.store({at}, tl.where(part == 0, {value}, 0.0), mask={mask})"]
        before += " + WIDTH" if k in s.matrices else " + 1"
    return clear, ["for part in range(parts):", *[f"    {line}" for line in sums]] if sums else [], []


DECODE = """
@triton.jit
def decode(
    {arguments}, h_ptr, out_ptr, C, total, x_b, x_g, x_c, h_b, h_s, h_c, o_b, o_s, o_c,
    LANES: tl.constexpr, FAST: tl.constexpr,
):
    lane = tl.program_id(0) * LANES + tl.arange(0, LANES)
    ok = lane < total
    b, c = (lane // C).to(tl.int64), lane % C
    zero = tl.zeros([LANES], tl.float32)
    {loads}
    $h{i} = tl.load(h_ptr + b * h_b + {i} * h_s + c * h_c, mask=ok, other=0.0).to(tl.float32)$
    {step}
    {stores}
"""


def decode(s: Source) -> str:
    """The module with `decode`, one step of a batch, as text."""
    at = "x_ptr + b * x_b + c * x_c"
    loads = [f"x0_{g} = tl.load({_apart(at, 'x_g', g)}, mask=ok, other=0.0)" for g in range(s.inputs)]
    loads += [f"p{k} = tl.load(p{k}_ptr + c, mask=ok, other=0.0).to(tl.float32)" for k in range(s.params)]
    line, values = call("step", s.step, s.given([f"h{i}" for i in range(s.slots)], 0), "w")
    at = "out_ptr + b * o_b + c * o_c"
    stores = [
        f"tl.store({at} + {i} * o_s, {_spread(v)}.to(out_ptr.dtype.element_ty), mask=ok)" for i, v in enumerate(values)
    ]
    blocks = {
        "arguments": ", ".join(["x_ptr", *_param_pointers(s)]), "loads": loads, "step": [line], "stores": stores
    }  # fmt: skip
    return HEADER + function("step", s.step, s.arguments) + "\n" + fill(DECODE, s.slots, blocks)


# Numbers whose divisibility changes nothing: one compiled kernel serves them all.
_ANY = ["groups", "T0", "LO", "L", "CL", "chunks", "snap", "records", "burn", "furthest", "parts", "ratio", "sub", "most", "per", "batch"]  # fmt: skip


def _module(
    name: str, s: Source, functions: list[str], arguments: list[str], setup: list[str], clear: list[str], finish: list[str],
    blank: list[str], loads: Callable, steps: Callable,
) -> str:  # fmt: skip
    slots = range(s.slots)
    pairs = [(i, k) for i in slots for k in slots]

    def loop(jacobian: bool, write: bool, unroll: int, stages: int) -> list[str]:
        body = {"loads": loads(not write and s.width is not None, unroll), "steps": steps(jacobian, write, unroll)}
        blocks = {**body, "U": unroll, "stages": stages}
        return fill(LOOP, s.slots, blocks).rstrip("\n").split("\n")

    def largest(terms: list[str]) -> str:
        return terms[0] if len(terms) == 1 else f"tl.maximum({largest(terms[:-1])}, {terms[-1]})"

    fixed = lambda template: [n for n in _ANY if re.search(rf"\b{n}\b", taken + template.split("):")[0])]
    taken = f"{', '.join(arguments)}, {PLACE}"
    blocks = {
        "name": name, "arguments": ", ".join(arguments), "place": PLACE, "patience": PATIENCE, "S": s.slots, "U": s.unroll,
        "setup": setup, "clear": clear, "largest_r": largest([f"r{i}" for i in slots]),
    }  # fmt: skip
    if s.width is not None:
        blocks |= {"apart": " | ".join(f"~(r{i} <= tol * tl.maximum(z{i}, floor))" for i in slots), "finish": finish}
        blocks |= {"nearer": NEARER, "forgotten": NEARER**2, "largest_o": largest([f"o{i}" for i in slots])}
        # Chunks that corrections have made exact and written themselves; of all of time where sums are over it.
        blocks["known"] = "skip" if clear else "passes - 1"
        blocks |= {"lead": loop(False, False, s.unroll, s.stages), "write": loop(False, True, s.unroll, s.stages)}
        text = [fill(t, s.slots, blocks | {"fixed": str(fixed(t))}) for t in head_skeleton.TEXTS]
        return HEADER + HEAD_FUNCTIONS + "\n".join([*functions, *text])
    results = ", ".join([f"n{i}{k}" for i, k in pairs] + [f"o{i}" for i in slots])
    given = ", ".join([f"clamped(m{i}{k})" for i, k in pairs] + [f"r{i}" for i in slots])
    blocks |= {
        "scan": [f"{results} = tl.associative_scan(({given}), 0, compose)"],
        "weight": largest([" + ".join(f"tl.abs(j{i}{k})" for k in slots) for i in slots]),
        "largest": largest([f"tl.abs(d{i})" for i in slots]),
        "outside": " | ".join(f"~(tl.abs({v}{i}) <= tol * z{i})" for i in slots for v in "dc"),
        "apart": " | ".join(f"~(r{i} <= tol * z{i})" for i in slots),
        "unmoved": [], "still": [], "stuck": [],
    }  # fmt: skip
    if name == "forward" and s.kinked:  # a derivative of zero at zero does not say that what was there is forgotten
        blocks["unmoved"] = ["still = zero > 0.0"]
        blocks["still"] = [f"still = still | (joined & (s{i} == 0.0) & (o{i} != 0.0))" for i in slots]
        blocks["stuck"] = [f"bad = bad | ((t{i} == 0.0) & (v{i} != 0.0))" for i in slots]
        blocks["apart"] = f"still | {blocks['apart']}"
    # A corrected trip is short where it can be: compilation takes more than its share of long ones.
    short = s.unroll if name == "backward" and s.save else 1
    # Jacobians of many states leave no registers for a long one.
    lead = loop(True, False, short if s.slots > 2 else s.unroll, s.stages)
    write = loop(False, True, s.unroll, s.stages)
    both = loop(True, True, short, 2 if short > 1 else 4)
    run = fill(RUN, s.slots, blocks | {"finish": finish, "lead": lead, "write": write})
    shoot = fill(SHOOT, s.slots, blocks | {"fixed": str(fixed(SHOOT))})
    correct = fill(CORRECT, s.slots, blocks | {"fixed": str(fixed(CORRECT)), "finish": finish + blank, "both": both})
    return HEADER + "\n".join([*functions, _compose(s.slots), run, shoot, correct])


def _spread(v: Atom) -> str:
    """A value over the whole tile: names may stand for one row or one number."""
    return f"full({v}, zero)" if isinstance(v, str) else f"(zero + {atom(v)})"


def _apart(pointer: str, stride: str, n: int) -> str:
    """The pointer n strides on, without a product that 32 bits could not hold."""
    return pointer + f" + {stride}" * n


def _mask(apart: bool) -> str:
    """Positions beyond the ends are masked where there are any; always where rows of a tile begin `apart`, as in the leads of heads."""
    return "mask=ok, other=0.0" if apart else "mask=ok if MASKED else None"


def _position(u: int) -> list[str]:
    """q: the position in the sweep; ok: whether it exists; time: where it lies in memory."""
    return [
        f"q = origin + t + {u}",
        "ok = (q >= LO) & (q < L) & inside",
        "time = (T0 + q * DIR).to(tl.int64) if WIDE else T0 + q * DIR",
    ]


def _param_pointers(s: Source) -> list[str]:
    return [f"p{k}_ptr" for k in range(s.params)]


_MATRIX = "(tile * USED + k) * WIDTH + lane % WIDTH"  # where entry (k, lane) of a block-diagonal tile lies in (H, n, n)
_TRANSPOSED = "(tile * USED + lane) * WIDTH + k % WIDTH"


def _load_params(s: Source) -> list[str]:
    out = []
    for k in range(s.params):
        if k in s.matrices:
            out += [
                f"p{k} = tl.load(p{k}_ptr + {_MATRIX}, mask=same & (tile * USED + k < C), other=0.0).to(tl.float32)",
                f"p{k}_t = tl.load(p{k}_ptr + {_TRANSPOSED}, mask=same & (col < C), other=0.0).to(tl.float32)",
            ]
        else:
            out.append(f"p{k} = tl.load(p{k}_ptr + col, mask=inside, other=0.0).to(tl.float32)")
    return out


def _load_entering(pointer: str, slots: int) -> list[str]:
    at = f"{pointer} + b * {slots} * C + col"
    return [f"i{i} = full(tl.load({at} + {i} * C, mask=inside, other=0.0).to(tl.float32), zero)" for i in range(slots)]


def _store_end(slots: int) -> list[str]:
    at = f"end_ptr + b * {slots} * C + col + 0 * row"
    return [f"tl.store({at} + {i} * C, v{i}.to(end_ptr.dtype.element_ty), mask=final)" for i in range(slots)]


def _load_inputs(s: Source, u: int, apart: bool, boundary: str) -> list[str]:
    out = ["at = x_head + time * x_t + col * x_c"]
    out += [f"x{u}_{g} = tl.load({_apart('at', 'x_g', g)}, {_mask(apart)})" for g in range(s.inputs)]
    if s.reset:
        # r_shift is 1 for a reverse scan: it enters t from t + 1, across the boundary that reset[t + 1] marks
        out.append(f"cut{u} = tl.load(reset_ptr + b * r_b + (time + r_shift) * r_t, mask={boundary}, other=0)")
    return out


def _snapshot(s: Source) -> list[str]:
    """Every `snap` positions, the carry goes on record: where a correction may begin. A counter, not a division in every trip."""
    if s.width is not None:
        return []
    at = f"starts_ptr + (b * {s.slots} * records + part * (CL // snap) + recorded) * C + col"
    stores = [f"tl.store({at} + {i} * records * C, v{i}, mask=inside & (t == recorded * snap))" for i in range(s.slots)]
    count = ["recorded += (t == recorded * snap).to(tl.int32)"]
    return ["if not ALONE:", *[f"    {line}" for line in stores + count]]


def _cut(s: Source, u: int, carries: list[str], jacobian: bool) -> list[str]:
    """Nothing crosses a reset: a select, which stops NaN too."""
    if not s.reset:
        return []
    entries = [f"m{i}{k}" for i in range(s.slots) for k in range(s.slots)] if jacobian else []
    return [f"{v} = tl.where(cut{u} != 0, 0.0, {v})" for v in carries + entries]


def _reached(a: list[list[Atom]]) -> list[tuple[int, int]]:
    """(i, k) where a power of `a` can have an entry: the others of m stay what they are in the identity."""
    slots = range(len(a))
    reached = {(i, k) for i in slots for k in slots if i == k or a[i][k] != 0.0}
    for j in slots:
        reached |= {(i, k) for i in slots for k in slots if (i, j) in reached and (j, k) in reached}
    return sorted(reached)


def _compose_step(a: list[list[Atom]]) -> list[str]:
    """m <- a m at positions that exist."""
    reached = _reached(a)
    sums = {(i, k): dot((a[i][j], f"m{j}{k}") for j in range(len(a)) if (j, k) in reached) for i, k in reached}
    new = [f"n{i}{k} = {total}" for (i, k), total in sums.items()]
    return new + [f"m{i}{k} = tl.where(ok, n{i}{k}, m{i}{k}) if MASKED else n{i}{k}" for i, k in reached]


def _carry_on(s: Source, values: Sequence[Atom], write: bool) -> list[str]:
    """The new carries, all at once; positions that do not exist leave them as they are. In heads, how far they went is noted."""
    out = [f"k{i} = {_spread(v)}" for i, v in enumerate(values)]
    always = s.width is not None and not write
    kept = "tl.where(ok, k{0}, v{0})" if always else "tl.where(ok, k{0}, v{0}) if MASKED else k{0}"
    out += [f"v{i} = {kept.format(i)}" for i in range(len(values))]
    noted = [] if s.width is None or always else [f"far = larger(far, tl.abs(v{i}))" for i in range(len(values))]
    return out + noted


def _compose(slots: int) -> str:
    """The affine map g after f, entries kept finite: the operator of the scan over rows."""
    r = range(slots)
    names = [f"{p}{i}{k}" for p in "f" for i in r for k in r] + [f"fr{i}" for i in r]
    names += [f"g{i}{k}" for i in r for k in r] + [f"gr{i}" for i in r]
    product = ["clamped(" + " + ".join(f"g{i}{m} * f{m}{k}" for m in r) + ")" for i in r for k in r]
    shift = ["finite(" + " + ".join([*[f"g{i}{m} * fr{m}" for m in r], f"gr{i}"]) + ", 1e30)" for i in r]
    return f"@triton.jit\ndef compose({', '.join(names)}):\n    return {', '.join(product + shift)}\n\n"
