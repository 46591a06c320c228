"""`ps.tune`: measure a few tilings of the generated kernels for one shape, and keep the fastest for this device, on disk."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .cell import Cell, parameter_shapes, sizes
from .errors import BackendError, bad_value
from .op import as_seen
from .plan import AUTO, compute_dtype, make_plan, no_kernel, plan_for, trace_for
from .scan import check_arguments, scan
from .tiling import MOST_ROWS, Tiling, remember, tuned

KERNELS = replace(AUTO, backend="triton")


def tune(
    cell: Cell, x: Tensor, params: Tensor | Sequence[Tensor] | None = None, repeats: int = 20
) -> dict[Tiling, float]:
    """Seconds of forward and backward of `ps.scan(cell, x, params)` for each tiling tried, fastest first; the fastest of each is remembered.

    - `x` (B, T, G, C), or with channels in heads, on a CUDA device: its shape, dtype and values decide, as a cell that forgets slowly needs
      other chunks. What a layer runs: `ps.tune(*layer.prepared(x))`.
    - `params` as in `ps.scan`; None: zeros.
    - `repeats`: timed runs of each tiling.

    Later plans for the same cell, shape, dtype and device use it, in this process and others (`tilings.json` in the user's cache
    folder). Raises `BackendError` where no kernel runs, and as `ps.scan` does.
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
    plan = plan_for(cell, x, seen, KERNELS)[0]
    assert plan.tiling is not None and plan.backward is not None
    key = (found.digest, str(x.dtype), *shape)
    before, seconds = tuned(x.device).get(str(key)), dict[Tiling, tuple[float, float]]()
    try:
        for candidate in _candidates(plan.tiling, plan.backward, shape[1], shape[3], cell.width is not None):
            tuned(x.device)[str(key)] = candidate, candidate
            make_plan.cache_clear()
            seconds[candidate] = _time(cell, x, given, repeats)
    finally:
        tuned(x.device).pop(str(key), None)
        if before is not None:  # kept if a run failed
            tuned(x.device)[str(key)] = before
        make_plan.cache_clear()
    best = [min(seconds, key=lambda tiling: seconds[tiling][way]) for way in (0, 1)]
    remember(x.device, str(key), (best[0], best[1]))
    return {tiling: sum(both) for tiling, both in sorted(seconds.items(), key=lambda pair: sum(pair[1]))}


def _candidates(start: Tiling, back: Tiling, time: int, channels: int, heads: bool) -> list[Tiling]:
    tiles = {(t.columns, t.warps) for t in (start, back)}
    if not heads:
        tiles |= {(w, n) for w, n in ((32, 1), (64, 1), (128, 1), (128, 2)) if w <= max(start.columns, channels)}
    most = max(1, min(time // start.burn, MOST_ROWS if heads else time))
    counts = {n for t in (start, back) for n in (t.chunks // 2, t.chunks, t.chunks * 2) if 1 <= n <= most}
    cut = [start, back]
    cut += [
        replace(start, columns=w, warps=n, chunks=c, narrow=min(w, start.narrow))
        for w, n in sorted(tiles)
        for c in sorted(counts)
    ]
    if not heads:
        cut += [replace(t, roomy=not t.roomy) for t in (start, back)]
    if not heads and start.chunks > 1:  # heads cannot tell whether a lead was long enough
        cut += [replace(start, burn=b) for b in (16, 32, 64)]
    return list(dict.fromkeys(cut))


def _time(cell: Cell, x: Tensor, params: list[Tensor], repeats: int) -> tuple[float, float]:
    """Seconds forward and backward."""
    leaves = [v.detach().clone().requires_grad_() for v in (x, *params)]
    grad = torch.randn_like(x[:, :, 0]).flatten(2)

    def once() -> tuple[float, float]:
        begun, turned, ended = (torch.cuda.Event(enable_timing=True) for _ in range(3))
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
