"""`ps.tune`: measure a few tilings of the generated kernels for one shape, and keep the fastest for this device, on disk."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .cell import Cell, parameter_shapes, sizes
from .errors import BackendError, bad_value
from .op import as_seen
from .plan import AUTO, compute_dtype, make_plan, no_kernel, plan_for, trace_for
from .scan import check_arguments, scan
from .tiling import MOST_ROWS, Pair, remember, tuned

KERNELS = replace(AUTO, backend="triton")


def tune(
    cell: Cell, x: Tensor, params: Tensor | Sequence[Tensor] | None = None, repeats: int = 20
) -> dict[Pair, float]:
    """Seconds of `ps.scan(cell, x, params)` with its backward pass for each pair of tilings tried, forward and backward, fastest first.

    - `x` (B, T, G, C), or with channels in heads, on a CUDA device: its shape, dtype and values decide, as a cell that forgets slowly needs
      other chunks. What a layer runs: `ps.tune(*layer.prepared(x))`.
    - `params` as in `ps.scan`; None: zeros.
    - `repeats`: timed runs of each tiling.

    The fastest forward and the fastest backward are remembered: later plans for the same cell, shape, dtype and device use them, in this
    process and others (`tilings.json` in the user's cache folder). Raises `BackendError` where no kernel runs, and as `ps.scan` does.
    """
    if isinstance(repeats, bool) or not isinstance(repeats, int) or repeats < 1:
        bad_value("repeats", repr(repeats), "an integer >= 1")
    if not isinstance(x, Tensor) or x.dim() not in (4, 5):
        bad_value("x", x, "a tensor (B, T, G, C) or (B, T, G, H, C / H)")
    shape = sizes(x)
    if params is None:
        params = [x.new_zeros(s) for s in parameter_shapes(cell, shape[3])]
    given = check_arguments(cell, x, params, None, None)
    seen = as_seen(cell, given, compute_dtype(x.dtype))
    found = trace_for(cell, x, seen)
    obstacle = no_kernel(cell, x.dtype, x.device, KERNELS, found.foreign) if x.is_cuda else "x is on the CPU"
    if obstacle is not None:
        raise BackendError(f"tune: no kernel runs here: {obstacle}.")
    from .triton.runtime import compile_all  # Triton is imported where it is used

    plan = plan_for(cell, x, seen, KERNELS)[0]
    assert plan.tiling is not None and plan.backward is not None
    key = str((found.digest, str(x.dtype), *shape))
    before = tuned(x.device).get(key)
    seconds: dict[Pair, tuple[float, float]] = {}
    pairs = _candidates((plan.tiling, plan.backward), shape[1], shape[3], cell.width is not None)
    state = x.new_empty(shape[0], len(cell.states), shape[3], device="meta")
    compile_all(cell, found, pairs, x, given, state, plan.tol)
    try:
        for pair in pairs:
            tuned(x.device)[key] = pair
            make_plan.cache_clear()
            seconds[pair] = _time(cell, x, given, repeats)
    finally:
        tuned(x.device).pop(key, None)
        if before is not None:  # kept if a run failed
            tuned(x.device)[key] = before
        make_plan.cache_clear()
    remember(x.device, key, _fastest(seconds))
    return {pair: sum(both) for pair, both in sorted(seconds.items(), key=lambda found: sum(found[1]))}


def _fastest(seconds: dict[Pair, tuple[float, float]]) -> Pair:
    """The tiling that was fastest forward, and the one that was fastest backward."""
    forward, backward = (min(seconds, key=lambda pair: seconds[pair][way])[way] for way in (0, 1))
    return forward, backward


def _candidates(start: Pair, time: int, channels: int, heads: bool) -> list[Pair]:
    """Pairs with the same change to what a plan would take forward and backward."""
    tiles, widest = {(t.columns, t.warps) for t in start}, max(t.columns for t in start)
    if not heads:
        tiles |= {(w, n) for w, n in ((32, 1), (64, 1), (128, 1), (128, 2)) if w <= max(widest, channels)}
    most = max(1, min(time // start[0].burn, MOST_ROWS if heads else time))
    counts = {n for t in start for n in (t.chunks // 2, t.chunks, t.chunks * 2) if 1 <= n <= most}

    def both(**changes: Any) -> Pair:
        return replace(start[0], **changes), replace(start[1], **changes)

    narrow = min(t.narrow for t in start)
    pairs = [
        start,
        *(both(columns=w, warps=n, chunks=c, narrow=min(w, narrow)) for w, n in sorted(tiles) for c in sorted(counts)),
    ]
    if not heads:
        pairs.append((replace(start[0], roomy=not start[0].roomy), replace(start[1], roomy=not start[1].roomy)))
    if not heads and max(t.chunks for t in start) > 1:  # heads cannot tell whether a lead was long enough
        pairs += [both(burn=b) for b in (16, 32, 64)]
    return list(dict.fromkeys(pairs))


def _time(cell: Cell, x: Tensor, params: list[Tensor], repeats: int) -> tuple[float, float]:
    """Seconds forward and backward."""
    leaves = [v.detach().clone().requires_grad_() for v in (x, *params)]
    grad = torch.randn_like(x[:, :, 0]).flatten(2)

    def once() -> tuple[float, float]:
        begun, turned, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        with torch.cuda.device(x.device):
            torch.cuda._sleep(2_000_000)  # a millisecond, in which the host gets ahead
        begun.record(torch.cuda.current_stream(x.device))
        with torch.enable_grad():
            y, _ = scan(cell, leaves[0], tuple(leaves[1:]) or None, solver=KERNELS)
        turned.record(torch.cuda.current_stream(x.device))
        torch.autograd.grad(y, leaves, grad, allow_unused=True)
        ended.record(torch.cuda.current_stream(x.device))
        torch.cuda.synchronize(x.device)
        return begun.elapsed_time(turned) / 1e3, turned.elapsed_time(ended) / 1e3

    for _ in range(3):
        once()
    forward, backward = zip(*(once() for _ in range(repeats)), strict=True)
    return statistics.median(forward), statistics.median(backward)
