"""`ps.scan` against autograd through the for-loop over the same step, forward and backward, on this machine's CPU.

Prints a table: for each shipped cell, long sequences (the speed-up) and short ones (never slower than the loop). Medians of
interleaved runs; the agreement error against the fp64 loop stands in each row, and a row whose error is too large says so.

    python benchmarks/cpu.py [--cells gru lstm] [--channels 64] [--repeats 5]
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import parashoot as ps
from parashoot.cell import Cell, parameter_shapes
from parashoot.solve.sequential import loop


def problem(cell: Cell, batch: int, length: int, channels: int, seed: int = 0) -> tuple[Tensor, list[Tensor]]:
    """Random inputs and recurrent weights of standard deviation 0.5 (matrices 0.5 / sqrt(n))."""
    torch.manual_seed(seed)
    x = torch.randn(batch, length, len(cell.inputs), channels)
    params = [torch.randn(s) * 0.5 / (s[-1] ** 0.5 if len(s) > 1 else 1.0) for s in parameter_shapes(cell, channels)]
    return x.requires_grad_(), [p.requires_grad_() for p in params]


def plain_loop(cell: Cell, x: Tensor, params: list[Tensor]) -> Tensor:
    """The loop a user would write: unbound inputs, one tensor a state, outputs stacked at the end."""
    heads = (-1, cell.width) if cell.width else None
    if heads:
        x = x.unflatten(-1, heads)
        params = [p.unflatten(0, heads) if p.dim() == 1 else p for p in params]
    states = [torch.zeros_like(x[:, 0, 0])] * len(cell.states)
    outputs = []
    for inputs in x.unbind(1):
        states = cell.new_states(states, inputs.unbind(1), params)
        outputs.append(states[cell.output])
    y = torch.stack(outputs, 1)
    return y.flatten(-2) if heads else y


def both_ways(run: Callable[[], Tensor], leaves: list[Tensor]) -> Callable[[], float]:
    """Time one forward and backward."""

    def once() -> float:
        start = time.perf_counter()
        y = run()
        torch.autograd.grad(y, leaves, torch.ones_like(y))
        return time.perf_counter() - start

    return once


def medians(runs: list[Callable[[], float]], repeats: int) -> list[float]:
    """Interleaved medians after one warm-up."""
    for run in runs:
        run()
    times = [[run() for run in runs] for _ in range(repeats)]
    return [statistics.median(column) for column in zip(*times, strict=True)]


def row(cell: Cell, batch: int, length: int, channels: int, repeats: int) -> str:
    x, params = problem(cell, batch, length, channels)
    given = params or None
    parallel = both_ways(lambda: ps.scan(cell, x, given)[0], [x, *params])
    plain = both_ways(lambda: plain_loop(cell, x, params), [x, *params])
    ours, theirs = medians([parallel, plain], repeats)
    with torch.no_grad():
        y, _, info = ps.scan(cell, x, given, return_info=True)
        exact = loop(cell, x.double(), [p.double() for p in params])[0]
        own = float((loop(cell, x, params)[0] - exact).abs().max())
    error = float((y - exact).abs().max())
    verdict = "" if error <= max(1e-5, 2 * own) else "  WRONG"
    return (
        f"{cell.name:15} {batch:2} x {length:5} x {channels:3}  scan {ours * 1e3:8.2f} ms  loop {theirs * 1e3:8.2f} ms  "
        f"{theirs / ours:6.2f}x  chunk {info.chunk_length:5}  sweeps {info.iterations:2}  error {error:.1e}{verdict}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cells", nargs="*", default=ps.cells.__all__, choices=ps.cells.__all__)
    parser.add_argument("--channels", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    print(
        f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; forward + backward, medians"
    )
    for batch, length, repeats in (
        (1, 4096, 1),
        (2, 4096, 1),
        (4, 4096, 1),
        (1, 16, 20),
        (1, 64, 8),
        (4, 16, 20),
        (4, 64, 8),
    ):
        for name in args.cells:
            print(row(getattr(ps.cells, name), batch, length, args.channels, args.repeats * repeats), flush=True)


if __name__ == "__main__":
    main()
