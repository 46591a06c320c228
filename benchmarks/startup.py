"""What a process pays once, on a GPU: the first call of a cell, compiled and from the disk cache; memory over many shapes.

Each figure comes from a fresh process. "import": PyTorch's tracer and compiler, which the first trace in a process loads, whatever
the cell; "forward", "backward": the first call of a cell after that, tracing, generation and compilation included.

    python benchmarks/startup.py [--cells gru,lstm,slstm] [--shapes 1000]
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time

import torch

import parashoot as ps


def first_call(name: str) -> dict[str, float]:
    """Seconds of the first forward and backward pass of a cell, and of what the first trace of any cell loads."""
    cell = getattr(ps.cells, name)
    torch.zeros(1, device="cuda")
    begun = time.perf_counter()
    ps.scan(ps.cells.elman_diagonal, torch.zeros(1, 2, 1, 4), torch.zeros(1, 4))
    loaded = time.perf_counter()
    x = torch.randn(8, 2048, len(cell.inputs), 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    params = [torch.randn(256, device="cuda", requires_grad=True) for _ in cell.params]
    torch.cuda.synchronize()
    ready = time.perf_counter()
    y, _ = ps.scan(cell, x, tuple(params) or None)
    torch.cuda.synchronize()
    forward = time.perf_counter()
    y.sum().backward()
    torch.cuda.synchronize()
    return {"import": loaded - begun, "forward": forward - ready, "backward": time.perf_counter() - forward}


def memory(shapes: int) -> dict[str, float]:
    """Resident MiB of the process after 50 random shapes and after `shapes` more, forward and backward."""
    cell, draw = ps.cells.gru, random.Random(0)
    params = [torch.randn(256, device="cuda", requires_grad=True) for _ in cell.params]

    def run(n: int) -> float:
        for _ in range(n):
            x = torch.randn(draw.randint(1, 8), draw.randint(1, 4000), 3, 256, device="cuda", dtype=torch.bfloat16)
            ps.scan(cell, x, tuple(params))[0].sum().backward()
        torch.cuda.synchronize()
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

    begun = time.perf_counter()
    before = run(50)
    warm = time.perf_counter()
    after = run(shapes)
    return {"before": before, "after": after, "warm_s": warm - begun, "seconds": time.perf_counter() - warm}


def child(*arguments: str, cache: str) -> dict[str, float]:
    """This script in a process of its own, with Triton's cache in a given folder."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(
        command, env={**os.environ, "TRITON_CACHE_DIR": cache}, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cells", default="gru,lstm,slstm")
    parser.add_argument("--shapes", type=int, default=1000)
    parser.add_argument("--child", nargs=2, metavar=("WHAT", "VALUE"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        what, value = options.child
        print(json.dumps(first_call(value) if what == "first" else memory(int(value))))
        return 0
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as cache:
        for name in options.cells.split(","):
            for kind in ("compiled", "from the disk cache"):
                seconds = child("--child", "first", name, cache=cache)
                print(name, kind, ", ".join(f"{k} {v:.2f} s" for k, v in seconds.items()), flush=True)
        facts = child("--child", "memory", str(options.shapes), cache=cache)
        print(f"memory after 50 shapes {facts['before']:.0f} MiB, after {options.shapes} more {facts['after']:.0f} MiB")
        print(f"first 50 in {facts['warm_s']:.1f} s, the others in {facts['seconds']:.1f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
