"""Cells that mix their state, by width, structure and how long they remember: what each way to solve them costs.

A positive "held" is added to the gate that keeps the state (of `headgru` taken from the one that lets it go): 0 forgets within some
steps, 8 within thousands. `headrotor` turns its state and never forgets. An entry is sweeps, milliseconds forward, and with gradients;
on a GPU also the MiB that both take beside the inputs. * marks an answer off the fp64 loop by more than the numerics contract.

    python benchmarks/heads.py [--shape 4 1024 128] [--device cpu] [--write docs/heads.md]
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

import parashoot as ps
from parashoot.bench.cases import Case, problem
from parashoot.bench.results import markdown
from parashoot.solve.sequential import loop

SOLVERS = {
    "loop": ps.Sequential(), "plan": None, "no Jacobian": ps.MultipleShooting(jacobian="zero"),
    "its diagonal": ps.MultipleShooting(jacobian="diagonal"), "exact": ps.MultipleShooting(),
}  # fmt: skip
KEEPS = {"headgru": ("z", -1.0), "headlstm": ("f", 1.0)}  # the gate and the sign with which it holds
CELLS = [(f"headgru/{n}", held) for n in (4, 8, 16, 32) for held in (0, 4, 8)]
CELLS += [(f"headlstm/{n}", held) for n in (8, 16) for held in (0, 8)] + [("headrotor", 0)]
BEGIN, END = "<!-- table: benchmarks/heads.py -->\n", "<!-- end of table -->"


def milliseconds(run: Callable[[], object], device: torch.device) -> float:
    """The median of some runs after one that warms up."""
    found = []
    for _ in range(4):
        begun = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append((time.perf_counter() - begun) * 1e3)
    return statistics.median(found[1:])


def entry(
    cell: ps.Cell, x: torch.Tensor, params: list[torch.Tensor], solver: object, want: torch.Tensor, bound: float
) -> str:
    """What one solver does with one problem."""
    leaves = [v.clone().requires_grad_() for v in (x, *params)]
    run = lambda: ps.scan(cell, leaves[0], leaves[1:], solver=solver)[0]  # type: ignore[arg-type]
    on_gpu = x.device.type == "cuda"
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(x.device)
        held = torch.cuda.memory_allocated(x.device)
    with torch.no_grad():
        y, _, info = ps.scan(cell, x, params, solver=solver, return_info=True)  # type: ignore[arg-type]
        forward = milliseconds(run, x.device)
    both = milliseconds(lambda: torch.autograd.grad(run().sum(), leaves), x.device)
    memory = f", {(torch.cuda.max_memory_allocated(x.device) - held) / 2**20:.0f} MiB" if on_gpu else ""
    wrong = "" if float((y.double() - want).abs().max()) <= bound else "*"
    return f"{info.iterations}{wrong}: {forward:.0f}, {both:.0f}{memory}"


def table(shape: tuple[int, int, int], device: torch.device) -> str:
    lines = [["cell", "held", *SOLVERS]]
    for name, held in CELLS:
        case = Case(name, *shape, "float32")
        cell, (x, params) = case.step, problem(case, device)
        x = x.clone()
        if held:
            gate, sign = KEEPS[name.partition("/")[0]]
            x[:, :, cell.inputs.index(gate)] += sign * held
        want = loop(cell, x.double(), [p.double() for p in params])[0]
        bound = max(1e-5, 2 * float((loop(cell, x, params)[0] - want).abs().max()))
        lines.append([name, str(held), *(entry(cell, x, params, solver, want, bound) for solver in SOLVERS.values())])
        print(" | ".join(lines[-1]), flush=True)
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", type=int, nargs=3, default=(4, 1024, 128), metavar=("B", "T", "C"))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--write", type=Path, help="put the table into this page, between its two marker lines")
    options = parser.parse_args()
    found = table(tuple(options.shape), torch.device(options.device))
    if options.write:
        before, rest = options.write.read_text().split(BEGIN)
        options.write.write_text(f"{before}{BEGIN}{found}\n{END}{rest.split(END)[1]}")


if __name__ == "__main__":
    main()
