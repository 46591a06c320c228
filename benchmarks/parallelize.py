"""`ps.parallelize` against the same module called plainly, in one run: time, passes and agreement, by shape, cell and gate bias.

Forward and backward (`--forward`: without gradients), medians of alternating runs after calls from which the plan learns. Errors are
relative to the largest value: of outputs and of the worst gradient against the plain call, and of both against the same in fp64.
TF32 is off but where the row says tf32; "+3" adds 3 to the bias of the forget gate (LSTM) or update gate (GRU), so that it remembers.

    python benchmarks/parallelize.py [--device cpu --quick] [--only long|short] [--forward] [--out FILE]
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

import parashoot as ps
from parashoot.bench.results import facts

KINDS = {"gru": nn.GRU, "lstm": nn.LSTM}
VARIANTS = (("fp32", 0), ("fp32", 3), ("tf32", 0), ("bf16", 0))
LONG = ((8, 2048, 256), (8, 2048, 1024), (1, 16384, 512))
SHORT = tuple((8, time, 256) for time in (16, 32, 64, 128, 256, 512))
QUICK = ((2, 1024, 32), (1, 4096, 64), (1, 32, 64))
LEARN, REPEATS = 8, 3


def build(
    kind: str, dtype: str, bias: float, shape: tuple[int, int, int], device: torch.device
) -> tuple[nn.GRU | nn.LSTM, Tensor]:
    """A module with seeded weights, and its input (B, T, D)."""
    batch, steps, width = shape
    generator = torch.Generator().manual_seed(0)
    torch.manual_seed(0)
    module = KINDS[kind](width, width, batch_first=True)
    with torch.no_grad():
        module.bias_ih_l0[width : 2 * width] += bias
    x = torch.randn(batch, steps, width, generator=generator)
    kept = torch.bfloat16 if dtype == "bf16" else torch.float32
    return module.to(device, kept), x.to(device, kept)


def results(module: nn.RNNBase, x: Tensor, train: bool) -> list[Tensor]:
    """Outputs, final states, and in training the gradients of sum(y w) by inputs and weights, w random."""
    x = x.detach().requires_grad_(train)
    with torch.set_grad_enabled(train):
        y, last = module(x)
        found = [y, *(last if isinstance(last, tuple) else (last,))]
        if train:
            w = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y)
            found += torch.autograd.grad((y * w).sum(), [x, *module.parameters()])
    return [v.detach() for v in found]


def call(module: nn.RNNBase, x: Tensor, train: bool) -> Callable[[], None]:
    """What is timed."""
    x, dy = x.detach().requires_grad_(train), torch.randn_like(module(x)[0].detach())

    def run() -> None:
        with torch.set_grad_enabled(train):
            y = module(x)[0]
            if train:
                torch.autograd.grad(y, [x, *module.parameters()], dy)

    return run


def off(found: list[Tensor], wanted: list[Tensor], outputs: int) -> tuple[float, float]:
    """The largest error of an output, and of a gradient, each relative to the largest value of its tensor."""
    errors = [
        float((a.double() - b.double()).abs().max() / b.double().abs().max())
        for a, b in zip(found, wanted, strict=True)
    ]
    return max(errors[:outputs]), max(errors[outputs:], default=0.0)


def clock(run: Callable[[], None], device: torch.device, times: int) -> float:
    """Milliseconds a call."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(times):
        run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - begun) * 1e3 / times


def peak(run: Callable[[], None], device: torch.device) -> float | None:
    """MiB of the GPU's memory that a call adds at its peak."""
    if device.type != "cuda":
        return run()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def held(device: torch.device) -> int:
    """Bytes of the GPU's memory that are not free for others."""
    if device.type != "cuda":
        return 0
    gc.collect()
    torch.cuda.empty_cache()
    return torch.cuda.memory_reserved()


def measure(
    kind: str, variant: tuple[str, float], shape: tuple[int, int, int], device: torch.device, train: bool, truth: bool
) -> dict:
    dtype, bias = variant
    torch.backends.cudnn.allow_tf32 = dtype == "tf32"
    plain, x = build(kind, dtype, bias, shape, device)
    parallel, reserved = ps.parallelize(plain), held(device)
    for _ in range(LEARN):
        results(parallel, x, train)
    reserved = held(device) - reserved
    found, wanted = results(parallel, x, train), results(plain, x, train)
    outputs = 1 + (2 if kind == "lstm" else 1)
    error, gradient_error = off(found, wanted, outputs)
    row = {
        "kind": kind, "dtype": dtype, "bias": bias, "batch": shape[0], "time": shape[1], "width": shape[2], "train": train,
        "error": error, "gradient_error": gradient_error,
    }  # fmt: skip
    if truth:
        exact = results(plain.double(), x.double(), train)
        row |= {"fp64": off(found, exact, outputs), "plain_fp64": off(wanted, exact, outputs)}
        plain, x = build(kind, dtype, bias, shape, device)
        parallel = ps.parallelize(plain)
        for _ in range(LEARN):
            results(parallel, x, train)
    del found, wanted
    runs = {"plain": call(plain, x, train), "parallel": call(parallel, x, train)}
    row |= {f"{name}_mib": peak(run, device) for name, run in runs.items()}
    once = clock(runs["plain"], device, 1)
    times = max(1, min(50, int(20 / once)))
    repeats = 2 if once > 200 else REPEATS if once > 10 else 5 * REPEATS
    rounds = [{name: clock(run, device, times) for name, run in runs.items()} for _ in range(repeats)]
    row |= {f"{name}_ms": statistics.median(r[name] for r in rounds) for name in runs}
    row["speedup"] = row["plain_ms"] / row["parallel_ms"]
    (record,) = parallel.info
    return row | {
        "chunk_length": record.chunk_length,
        "passes": record.passes,
        "backward_passes": record.backward_passes,
        "recorded": record.recorded,
        "kept_mib": reserved / 2**20,
    }


def cases(options: argparse.Namespace) -> Iterator[tuple[str, tuple[str, float], tuple[int, int, int], bool]]:
    if options.quick:
        yield from ((k, v, s, True) for k, v, s in itertools.product(KINDS, VARIANTS[:2], QUICK))
        return
    if options.only != "short":
        for shape, kind, variant in itertools.product(LONG, KINDS, VARIANTS):
            yield kind, variant, shape, variant[0] == "fp32" and shape[1] < 4096
    if options.only != "long":
        for shape, kind, dtype in itertools.product(SHORT, KINDS, ("fp32", "bf16")):
            yield kind, (dtype, 0), shape, False


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="few small shapes")
    parser.add_argument(
        "--only", choices=("long", "short"), help="long: the shapes above 1,000 steps; short: 16 to 512 steps"
    )
    parser.add_argument("--forward", action="store_true", help="without gradients")
    parser.add_argument("--commit", metavar="HASH", help="what the rows call this version (default: git's)")
    parser.add_argument("--out", type=Path, help="rows are added to this file, one JSON object a line")
    options = parser.parse_args()
    device = torch.device(options.device)
    where = facts(device, options.commit)
    print(f"{where['device']}, commit {where['commit']}, torch {torch.__version__}")
    for kind, variant, shape, truth in cases(options):
        row = measure(kind, variant, shape, device, not options.forward, truth)
        bias = f" +{variant[1]}" if variant[1] else ""
        case = f"{kind} {variant[0]}{bias} {'x'.join(map(str, shape))}"
        ways = f"chunks of {row['chunk_length']}, {row['passes']} + {row['backward_passes']} passes{' in graphs' * row['recorded']}"
        line = f"{case:28} {row['plain_ms']:9.2f} -> {row['parallel_ms']:8.2f} ms {row['speedup']:6.2f}x  "
        line += f"{ways if row['chunk_length'] else 'plainly':42} error {row['error']:.1e} gradient {row['gradient_error']:.1e}"
        if truth:
            line += " | fp64: {:.1e} {:.1e}, plain {:.1e} {:.1e}".format(*row["fp64"], *row["plain_fp64"])
        if row["plain_mib"]:
            line += f" | {row['plain_mib']:.0f} -> {row['parallel_mib']:.0f} MiB, {row['kept_mib']:.0f} kept"
        print(line, flush=True)
        if options.out:
            with options.out.open("a") as file:
                file.write(json.dumps({**row, **where}) + "\n")


if __name__ == "__main__":
    main()
