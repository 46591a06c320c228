"""How many sweeps multiple shooting takes, by chunk length: the table that motivates long chunks.

For the paper's GRU and LSTM and the sLSTM, random inputs and recurrent weights ~ sigma N(0, 1), in fp32 and fp64, T = 1024,
at default tolerance. Each entry is the sweeps of the slowest of the sequences; the loop's answer is checked in every run.

    python benchmarks/iterations.py [--write docs/iterations.md]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import parashoot as ps
from parashoot.cell import Cell, parameter_shapes
from parashoot.solve.sequential import loop

CHUNKS = (1, 4, 16, 64)
CELLS = ("gru", "lstm", "slstm")
SIGMAS = (0.3, 1.0, 2.0)
BATCH, TIME, CHANNELS = 2, 1024, 32


def sweeps(cell: Cell, sigma: float, dtype: torch.dtype) -> list[str]:
    """Sweeps for each chunk length, marked with * where the error against the fp64 loop exceeds the numerics contract."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(BATCH, TIME, len(cell.inputs), CHANNELS, generator=generator, dtype=torch.float64)
    params = [
        sigma * torch.randn(s, generator=generator, dtype=torch.float64) for s in parameter_shapes(cell, CHANNELS)
    ]
    exact = loop(cell, x, params)[0]
    own = float((loop(cell, x.to(dtype), [p.to(dtype) for p in params])[0] - exact).abs().max())
    found = []
    for chunk in CHUNKS:
        solver = ps.MultipleShooting(chunk)
        given = [p.to(dtype) for p in params]
        y, _, info = ps.scan(cell, x.to(dtype), given, solver=solver, return_info=True)
        bound = max(1e-5 if dtype == torch.float32 else 1e-10, 2 * own)
        found.append(f"{info.iterations}{'' if float((y - exact).abs().max()) <= bound else '*'}")
    return found


def table() -> str:
    lines = [
        f"| cell | weights | dtype | {' | '.join(f'chunk {c}' for c in CHUNKS)} |",
        "|---" * (3 + len(CHUNKS)) + "|",
    ]
    for name in CELLS:
        for sigma in SIGMAS:
            for dtype in (torch.float32, torch.float64):
                entries = sweeps(getattr(ps.cells, name), sigma, dtype)
                kind = str(dtype).removeprefix("torch.")
                lines.append(f"| {name} | ~{sigma:g} N(0,1) | {kind} | {' | '.join(entries)} |")
                print(lines[-1], flush=True)
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="put the table into this page, between its two marker lines")
    args = parser.parse_args()
    found = table()
    if args.write:
        begin, end = "<!-- table: benchmarks/iterations.py -->\n", "<!-- end of table -->"
        before, rest = args.write.read_text().split(begin)
        args.write.write_text(f"{before}{begin}{found}\n{end}{rest.split(end)[1]}")


if __name__ == "__main__":
    main()
