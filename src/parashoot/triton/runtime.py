"""Generated kernels at run time: from a trace to a module, from tensors to launches."""

from __future__ import annotations

import functools
import hashlib
import linecache
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from ..cell import Cell, gradient_like, sizes
from ..garbage import uncollected
from ..tiling import HEAD_ROWS, Pair, Tiling, stages_for, unroll_for
from ..trace import Trace
from .add_rows import add_rows
from .compiling import Job, compile_now, compile_together
from .sweep import Source, backward, decode, forward, source_of

REGISTERS = 255  # of a thread of a roomy tiling, at most; without a limit the assembler often stays far below
FURTHEST = 512  # steps of a lead after which it is given up where chunks are short, however long its first was


@functools.lru_cache(maxsize=512)
def load(made: Source, direction: str) -> tuple[Any, Any]:
    """The two kernels of a direction, read by Triton. The text lies in linecache, where Triton and tracebacks find it."""
    text = (forward if direction == "forward" else backward)(made)
    with uncollected():
        namespace = _execute(text, direction)
        kernels = namespace[f"{direction}_shoot"], namespace[f"{direction}_correct"]
        for kernel in kernels:
            getattr(kernel, "cache_key", None)  # parses the text; interpreted kernels have none
    return kernels


@functools.lru_cache(maxsize=512)
def _load_decode(made: Source) -> Any:
    return _execute(decode(made), "decode")["decode"]


def _execute(text: str, what: str) -> dict[str, Any]:
    name = f"<parashoot {what} {hashlib.sha256(text.encode()).hexdigest()[:16]}>"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    namespace: dict[str, Any] = {"__name__": f"parashoot_{what}"}
    exec(compile(text, name, "exec"), namespace)
    return namespace


def run_forward(
    cell: Cell, found: Trace, tiling: Tiling, back: Tiling, x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None,
    reverse: bool, all_states: bool, save: bool, tol: float, most: int | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(y (B, T, O, C), h_n, saved states (B, ceil(T / unroll), S, C) fp32 or empty, facts (N, 3): passes, defect, unsolved).

    `back` is the tiling of the backward pass, which is compiled meanwhile.
    """
    options = (x, params, h0, reset, reverse, all_states, save, tol, most)
    jobs, y, h_n, saved, facts = _forward_jobs(cell, found, tiling, *options)
    _start(
        jobs, x, (lambda: _backward_like(cell, found, back, x, params, h0, reset, y, saved, reverse)) if save else None
    )
    return y, h_n, saved, facts.view(-1, 3)


def _forward_jobs(
    cell: Cell, found: Trace, tiling: Tiling, x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None, reverse: bool,
    all_states: bool, save: bool, tol: float, most: int | None,
) -> tuple[list[Job], Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """The launches, and where they write y, h_n, saved states and facts."""
    batch, time, _, channels = sizes(x)
    kept = save and found.keeps_states(len(cell.states), x.dtype)
    made = source_of(found, cell, tiling.unroll, tiling.stages, all_states, reset is not None, kept)
    y = x.new_empty(batch, time, len(made.outputs), channels)
    h_n = h0.new_empty(h0.shape)
    given = {
        "x_ptr": x,
        **_params(params),
        "h_ptr": h0.contiguous(),
        "y_ptr": y,
        "end_ptr": h_n,
        **_strides(_in_heads(x), "x_b x_t x_g x_h x_c"),
    }
    given |= _strides(y, "y_b y_t") | _reset(reset, reverse)
    saved = x.new_empty(0, dtype=torch.float32)
    if made.save:
        groups = -(-time // tiling.unroll)
        saved = x.new_empty(batch, groups, made.slots, channels, dtype=torch.float32)
        given |= {"saved_ptr": saved, "groups": groups}
    place = {"T0": time - 1, "DIR": -1, "LO": 0, "L": time} if reverse else {"T0": 0, "DIR": 1, "LO": 0, "L": time}
    jobs, facts = _jobs(load(made, "forward"), made, given, place, x, tiling, tol, 1.0, most)
    return jobs, y, h_n, saved, facts


def _backward_like(
    cell: Cell, found: Trace, tiling: Tiling, x: Tensor, params: list[Tensor], h0: Tensor, reset: Tensor | None, y: Tensor,
    saved: Tensor, reverse: bool,
) -> list[Job]:  # fmt: skip
    """The launches that a backward pass will make if only y has a gradient, on tensors without memory: enough to compile by."""
    dy, start, given, weights = _like(y), _like(h0), _like(x), [_like(p) for p in params]
    cut, states = None if reset is None else _like(reset), _like(saved if saved.dim() > 1 else y)
    return _backward_jobs(cell, found, tiling, dy, None, given, weights, start, cut, states, reverse, 0.0)[0]


def _like(v: Tensor) -> Tensor:
    return torch.empty_strided(v.shape, v.stride(), dtype=v.dtype, device="meta")


def compile_all(
    cell: Cell, found: Trace, pairs: Iterable[Pair], x: Tensor, params: list[Tensor], h0: Tensor, tol: float
) -> None:
    """Have the kernels of several tilings, forward and backward, compiled at the same time."""
    given, weights, start = _like(x), [_like(p) for p in params], _like(h0)
    jobs = []
    for tiling, back in pairs:
        made, y, _, saved, _ = _forward_jobs(
            cell, found, tiling, given, weights, start, None, False, False, True, tol, None
        )
        jobs += [*made, *_backward_like(cell, found, back, given, weights, start, None, y, saved, False)]
    compile_now(jobs, x.device)


def run_backward(
    cell: Cell, found: Trace, tiling: Tiling, dy: Tensor, dh_n: Tensor | None, x: Tensor, params: list[Tensor], h0: Tensor,
    reset: Tensor | None, states: Tensor, reverse: bool, tol: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dparams in a row, dh0): `states` are those saved or, where none are, y (B, T, 1, C); dy (B, T, O, C); dh_n None: zeros."""
    jobs, dx, sums, dh0 = _backward_jobs(cell, found, tiling, dy, dh_n, x, params, h0, reset, states, reverse, tol)
    _start(jobs, x)
    return dx, add_rows(sums), dh0


def _backward_jobs(
    cell: Cell, found: Trace, tiling: Tiling, dy: Tensor, dh_n: Tensor | None, x: Tensor, params: list[Tensor], h0: Tensor,
    reset: Tensor | None, states: Tensor, reverse: bool, tol: float,
) -> tuple[list[Job], Tensor, Tensor, Tensor]:  # fmt: skip
    """The launches, and where they write dx, partial sums of dparams, and dh0."""
    batch, time, _, _ = sizes(x)
    dy = dy if dy.stride(3) == 1 else dy.contiguous()  # that of a sum is one number
    kept = found.keeps_states(len(cell.states), x.dtype)
    made = source_of(found, cell, tiling.unroll, tiling.stages, dy.shape[2] > 1, reset is not None, kept)
    dx, dh0 = gradient_like(x), h0.new_empty(h0.shape)
    unroll = tiling.unroll
    end = -(-time // unroll) * unroll if made.save else time  # saved states stand at multiples of unroll
    chunks = tiling.cut(end)[1]
    numbers = sum(p.numel() for p in params)
    parts = batch * chunks if made.width is None else _head_rows(batch, chunks)[3]
    sums = x.new_empty(parts, numbers, dtype=torch.float32)
    given = {
        "x_ptr": x,
        **_params(params),
        "dy_ptr": dy,
        "dh_ptr": None if dh_n is None else dh_n.contiguous(),
        "dx_ptr": dx,
        "dp_ptr": sums,
        "end_ptr": dh0,
    }
    given |= (
        _strides(_in_heads(x), "x_b x_t x_g x_h x_c")
        | _strides(dy, "dy_b dy_t dy_s")
        | _strides(_in_heads(dx), "dx_b dx_t dx_g dx_h")
        | _reset(reset, reverse)
    )
    if not made.save:
        given |= {"h_ptr": h0.contiguous(), "y_ptr": states, **_strides(states, "y_b y_t")}
    else:
        given |= {"saved_ptr": states, "groups": states.shape[1]}
    place = {"T0": time - end, "DIR": 1} if reverse else {"T0": end - 1, "DIR": -1}
    place |= {"LO": end - time, "L": end}
    jobs, _ = _jobs(load(made, "backward"), made, given, place, x, tiling, tol, 0.0, None)
    return jobs, dx, sums, dh0


def run_decode(cell: Cell, found: Trace, state: Tensor, inputs: Tensor, params: list[Tensor], out: Tensor) -> None:
    """One step of states (B, S, C) on inputs (B, G, C) into `out` (B, S, C), which may be `state`; any strides, no host work."""
    batch, slots, channels = state.shape
    made = source_of(found, cell, unroll_for(slots), stages_for(slots), False, False, False)
    given = {
        "x_ptr": inputs,
        **_params(params),
        "h_ptr": state,
        "out_ptr": out,
        "C": channels,
        "total": batch * channels,
    }
    given |= _strides(inputs, "x_b x_g x_c") | _strides(state, "h_b h_s h_c") | _strides(out, "o_b o_s o_c")
    fast = inputs.dtype == torch.bfloat16 and inputs.is_cuda
    with torch.cuda.device_of(state):
        _load_decode(made)[(-(-batch * channels // 128),)](**given, LANES=128, FAST=fast, num_warps=4)
    torch.autograd.graph.increment_version(out)


def _jobs(
    kernels: tuple[Any, Any], made: Source, given: dict[str, Any], place: dict[str, int], x: Tensor, tiling: Tiling, tol: float,
    floor: float, most: int | None,
) -> tuple[list[Job], Tensor]:  # fmt: skip
    """One launch or two, and where they report passes, defect and what is unsolved."""
    if made.width is not None:
        return _jobs_for_heads(kernels, made, given, place, x, tiling, tol, floor, most)
    batch, _, _, channels = sizes(x)
    length, columns = place["L"], tiling.columns
    each, chunks = tiling.cut(length)
    tiles = -(-channels // columns)
    new = functools.partial(x.new_empty, dtype=torch.float32)
    facts = new(batch, chunks, tiles, 3)
    snap = each // tiling.pieces
    records = chunks * tiling.pieces
    starts = new(batch, made.slots, records, channels) if chunks > 1 else facts
    ends = new(batch, made.slots, chunks, channels) if chunks > 1 else facts
    common = given | place | {"starts_ptr": starts, "ends_ptr": ends, "facts_ptr": facts, "C": channels, "tol": tol}
    common |= {"records": records} | _modes(given, x)
    ragged = lambda width, end: place["LO"] > 0 or channels % width != 0 or end != length
    shoot = {
        "CL": each, "tiles": tiles, "chunks": chunks, "snap": snap, "burn": min(tiling.burn, each), "furthest": max(2 * each, min(16 * tiling.burn, FURTHEST)),
        "BD": columns, "ALONE": chunks == 1, "MASKED": ragged(columns, chunks * each), "num_warps": tiling.warps,
    }  # fmt: skip
    if tiling.roomy:
        shoot["maxnreg"] = REGISTERS
    jobs: list[Job] = [(kernels[0], (tiles * chunks * batch,), common | shoot)]
    report = facts
    if chunks > 1:
        narrow = min(tiling.narrow, columns)
        rows = min(tiling.rows, 1 << (records - 1).bit_length())
        ratio = -(-records // rows)
        used = -(-records // ratio)
        narrow_tiles = -(-channels // narrow)
        report = new(batch, narrow_tiles, 3)
        carries = 128 if made.slots <= 2 else 64  # a warp
        correct = {
            "CL": snap * ratio, "tiles": narrow_tiles, "chunks": used, "parts": chunks, "ratio": ratio, "sub": tiling.pieces, "floor": floor,
            "most": most or 2**30, "report_ptr": report, "NC": rows, "BD": narrow, "SPAN": columns // narrow,
            "MASKED": used != rows or ragged(narrow, used * ratio * snap), "num_warps": max(1, min(8, rows * narrow // carries)),
        }  # fmt: skip
        jobs.append((kernels[1], (narrow_tiles * batch,), common | correct))
    return jobs, report


def _head_rows(batch: int, chunks: int) -> tuple[int, int, int, int]:
    """(rows of a sequence, of a program of the first launch, of one of the second; programs of the first for a tile)."""
    each, rows = 1 << (chunks - 1).bit_length(), HEAD_ROWS
    together = max(rows, each)
    return each, rows, together, -(-batch * each // together) * (together // rows)


def _jobs_for_heads(
    kernels: tuple[Any, Any], made: Source, given: dict[str, Any], place: dict[str, int], x: Tensor, tiling: Tiling, tol: float,
    floor: float, most: int | None,
) -> tuple[list[Job], Tensor]:  # fmt: skip
    assert made.width is not None
    batch, _, _, channels = sizes(x)
    each, chunks = tiling.cut(place["L"])
    used = tiling.columns // made.width * made.width
    tiles = -(-channels // used)
    per, rows, together, blocks = _head_rows(batch, chunks)
    new = functools.partial(x.new_empty, dtype=torch.float32)
    ends = new(batch, made.slots, chunks, channels)
    facts, report = new(blocks, tiles), new(blocks * rows // together, tiles, 3)
    common = given | place | _modes(given, x)
    common |= {
        "starts_ptr": torch.empty_like(ends), "ends_ptr": ends, "facts_ptr": facts, "C": channels, "CL": each, "per": per,
        "chunks": chunks, "batch": batch, "tiles": tiles, "BD": tiling.columns, "WIDTH": made.width,
    }  # fmt: skip
    ragged = place["LO"] > 0 or each * chunks != place["L"] or channels % tiling.columns or used < tiling.columns
    ragged = bool(ragged) or chunks < per or batch * per % rows > 0
    shoot = {"burn": min(tiling.burn, each), "NC": rows, "MASKED": ragged, "ALONE": chunks == 1}
    shoot["num_warps"] = tiling.warps
    correct = {
        "parts": together // rows, "tol": tol, "floor": floor, "most": most or 2**30, "report_ptr": report, "NC": together,
        "ALONE": chunks == 1, "ROWS": rows, "num_warps": min(8, together // rows * tiling.warps),
    }  # fmt: skip
    jobs: list[Job] = [
        (kernels[0], (blocks * tiles,), common | shoot),
        (kernels[1], (report[..., 0].numel(),), common | correct),
    ]
    return jobs, report


def _modes(given: dict[str, Any], x: Tensor) -> dict[str, Any]:
    wide = any(_extent(given[n]) >= 2**31 for n in _FAR & given.keys())
    return {"width": x.shape[-1], "FAST": x.dtype == torch.bfloat16 and x.device.type != "cpu", "WIDE": wide}


def _start(jobs: list[Job], x: Tensor, follow: Callable[[], list[Job]] | None = None) -> None:
    with torch.cuda.device_of(x):
        if x.is_cuda:
            compile_together(jobs, x, follow)
        for kernel, grid, arguments in jobs:
            kernel[grid](**arguments)


_FAR = {"x_ptr", "y_ptr", "dy_ptr", "dx_ptr"}  # what is addressed by strides within a sequence


def _in_heads(x: Tensor) -> Tensor:
    """x (B, T, G, C) as (B, T, G, 1, C)."""
    return x if x.dim() == 5 else x.unsqueeze(3)


def _extent(v: Tensor) -> int:
    """How far apart two elements of one sequence lie."""
    return sum((n - 1) * abs(s) for n, s in zip(v.shape[1:], v.stride()[1:], strict=True))


def _params(params: list[Tensor]) -> dict[str, Tensor]:
    return {f"p{k}_ptr": p.contiguous() for k, p in enumerate(params)}


def _strides(v: Tensor, names: str) -> dict[str, int]:
    return dict(zip(names.split(), v.stride(), strict=False))


def _reset(reset: Tensor | None, reverse: bool) -> dict[str, Any]:
    if reset is None:
        return {}
    return {"reset_ptr": reset.view(torch.uint8), **_strides(reset, "r_b r_t"), "r_shift": int(reverse)}
