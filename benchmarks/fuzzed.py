"""The fuzzer's cells on a GPU: agreement and time of the generated kernels, beside the larger of byte and instruction time.

Byte time: x, y and the saved states once (backward: x, y, dy, dx and saved states) at the bandwidth of a large copy. Instruction
time: the emitted step (backward: the adjoint, and the step where states are computed again) compiled alone; its machine
instructions, without the branches for huge arguments of sine and cosine, at one for each of a multiprocessor's 128 lanes and clock,
and at 16 for the special function unit. Passes: of the slowest tile of channels and on average; those that jump or latch take the loop's
time, whatever a step costs. A row for each cell and direction goes to the results file. With --tune, of the tilings that `ps.tune` finds.

    python benchmarks/fuzzed.py [--out FILE] [--seeds 0:40,43] [--shape B T C] [--tune]
"""

import argparse
import json
import linecache
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import parashoot as ps
from fuzzer import Source as Fuzzed
from parashoot.bench import results
from parashoot.bench.trial import Entry, Truth, agreement, clocks, copy_bandwidth
from parashoot.solve.sequential import loop
from parashoot.tiling import stages_for, unroll_for
from parashoot.trace import trace
from parashoot.triton.emit import function
from parashoot.triton.sweep import HEADER, Source, source_of

DUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
LANES, SPECIAL = 128, 16  # of a multiprocessor, a clock


def problem(seed: int, shape: tuple[int, int, int]) -> tuple[ps.Cell, torch.Tensor, list[torch.Tensor]]:
    """The cell, x (B, T, G, C) bf16 and its parameters."""
    batch, time, channels = shape
    source = Fuzzed(seed)
    draw = torch.Generator("cuda").manual_seed(seed)
    x = torch.randn(batch, time, source.inputs, channels, generator=draw, device="cuda", dtype=torch.bfloat16)
    params = [torch.randn(channels, generator=draw, device="cuda") for _ in range(source.params)]
    return source.cell(seed), x, params


def entry(cell: ps.Cell, x: torch.Tensor, params: list[torch.Tensor]) -> Entry:
    part = lambda v: v[:2, :512, ..., :64]
    pick = lambda tensors: [part(tensors[0]), *(p[:64] for p in tensors[1:])]
    truth = Truth(lambda x, *params: loop(cell, x, params)[0], [x, *params], part, pick)
    return Entry((x,), tuple(params), lambda x: ps.scan(cell, x, tuple(params) or None)[0], truth)


def made_from(cell: ps.Cell) -> Source:
    found, slots = trace(cell, torch.float32, torch.device("cpu"), (), ()), len(cell.states)
    kept = found.keeps_states(slots, torch.bfloat16)
    return source_of(found, cell, unroll_for(slots), stages_for(slots), False, False, kept)


def instructions(name: str, text: str, arguments: int, outputs: int) -> tuple[int, int]:
    """(machine instructions, those of the special function unit) of one call of the function `name` in `text`."""
    lists = [f"tl.load(x_ptr + {k} * 128 + at)" for k in range(arguments)]
    gather = ", ".join(f"w{k}" for k in range(outputs))
    kernel = "@triton.jit\ndef alone(x_ptr, o_ptr, CALL: tl.constexpr):\n    at = tl.arange(0, 128)\n"
    kernel += "".join(f"    a{k} = {load}\n" for k, load in enumerate(lists))
    given = ", ".join([*(f"a{k}" for k in range(arguments)), "True"])
    kernel += f"    if CALL:\n        {gather} = {name}({given})\n    else:\n"
    kernel += "".join(f"        w{k} = a{k % arguments}\n" for k in range(outputs))
    kernel += "".join(f"    tl.store(o_ptr + {k} * 128 + at, w{k} + 0.0 * a{k % arguments})\n" for k in range(outputs))
    text, file = HEADER + text + "\n\n" + kernel, f"<alone {name} {hash(text)}>"
    linecache.cache[file] = (len(text), None, text.splitlines(True), file)
    namespace: dict = {"__name__": "alone"}
    exec(compile(text, file, "exec"), namespace)
    whole, frame = (_count(_compile(namespace["alone"], call)) for call in (True, False))
    return whole[0] - frame[0], whole[1] - frame[1]


def _compile(kernel, call: bool):
    signature = {"x_ptr": "*fp32", "o_ptr": "*fp32", "CALL": "constexpr"}
    return triton.compile(ASTSource(kernel, signature, {(2,): call}), GPUTarget("cuda", 90, 32), {"num_warps": 4})


def _count(compiled) -> tuple[int, int]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        text = subprocess.run([DUMP, "-sass", file.name], capture_output=True, text=True, check=True).stdout
    total = special = 0
    until = 0
    for at, line in re.findall(r"/\*([0-9a-f]{4})\*/\s+(.*?);", text):
        if int(at, 16) < until or "NOP" in line:
            continue
        jump = re.match(r"@!?U?P\d BRA (?:`\()?0x([0-9a-f]+)", line)
        until = int(jump[1], 16) if jump else until  # what is jumped over is for huge arguments
        total, special = total + 1, special + ("MUFU" in line)
    return total, special


def work(made: Source) -> dict[str, tuple[float, float]]:
    """Instructions and special ones for each position and channel, by direction."""
    step = instructions("step", function("step", made.step, made.arguments), len(made.arguments), _results(made.step))
    names = [*made.arguments, *(f"g{i}" for i in range(made.slots))]
    adjoint = function("adjoint", made.adjoint, names)
    back = instructions("adjoint", adjoint, len(names), _results(made.adjoint))
    again = (made.unroll - 1) / made.unroll if made.save else 0.0
    return {"forward": step, "backward": (back[0] + again * step[0], back[1] + again * step[1])}


def _results(graph) -> int:
    return max(1, len(dict.fromkeys(o for o in graph.outputs if isinstance(o, str))))


def prepare(job: tuple[int, tuple[int, int, int], bool]) -> tuple[int, dict, str]:
    """Fill the disk cache and compare with the loop, in a process of its own: (seed, agreement, what went wrong)."""
    seed, shape, tunes = job
    try:
        cell, x, params = problem(seed, shape)
        if tunes:
            ps.tune(cell, x, tuple(params) or None, repeats=1)
        found = agreement(entry(cell, x, params), True)
        work(made_from(cell))
        return seed, found, ""
    except Exception as e:
        return seed, {}, f"{type(e).__name__}: {str(e)[:300]}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("fuzzed.jsonl"))
    parser.add_argument("--seeds", default="0:40", metavar="A:B,C", help="ranges and single ones")
    parser.add_argument("--shape", type=int, nargs=3, default=(8, 2048, 2048), metavar=("B", "T", "C"))
    parser.add_argument(
        "--tune", action="store_true", help="by the fastest tilings that ps.tune measures, kept for this run only"
    )
    parser.add_argument("--commit")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if options.tune:  # where tilings are kept; what Triton compiles stays in its own cache
            os.environ["XDG_CACHE_HOME"] = folder
        return measure(options)


def measure(options: argparse.Namespace) -> int:
    """Rows and a table of the cells asked for."""
    ranges = [[int(n) for n in part.split(":")] for part in options.seeds.split(",")]
    seeds, shape = [s for r in ranges for s in (range(*r) if len(r) > 1 else r)], tuple(options.shape)
    agreements = {}
    processes = min(16, os.cpu_count() or 1, len(seeds))  # which share the GPU's memory
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for seed, found, wrong in pool.imap_unordered(prepare, [(s, shape, options.tune) for s in seeds]):
            agreements |= {} if wrong else {seed: found}
            if wrong:
                print(f"{seed:4d} failed: {wrong}", flush=True)
    device = torch.device("cuda")
    card = torch.cuda.get_device_properties(device)
    query = ["nvidia-smi", "--query-gpu=clocks.max.sm", "--format=csv,noheader,nounits"]
    clock = 1e6 * float(subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0])
    bandwidth = copy_bandwidth(device)
    facts = {"copy_gb_s": bandwidth / 1e9, **results.facts(device, options.commit)}
    print(f"{facts['device']}, {clock / 1e9:.2f} GHz, copies at {bandwidth / 1e9:.0f} GB/s")
    print(
        "cell: slots inputs params | forward us, byte us, instruction us, ratio | backward the same | passes, mean | error, gradient"
    )
    elements, worst = shape[0] * shape[1] * shape[2], 0.0
    with torch.cuda.stream(torch.cuda.Stream()), options.out.open("a") as file:
        for seed, found in sorted(agreements.items()):
            cell, x, params = problem(seed, shape)
            given, made = entry(cell, x, params), made_from(cell)
            if options.tune:
                ps.tune(cell, x, tuple(params) or None)
                found = agreement(given, True)
            info = ps.scan(cell, x, tuple(params) or None, return_info=True)[2]
            passes = {"passes": info.iterations, "passes_mean": info.iterations_mean}
            _, _, timers = clocks(given, True)
            forward, both = (sorted(timers[k]() for _ in range(7))[3] for k in ("forward", "both"))
            saved = 4 * made.slots / made.unroll if made.save else 0
            moved = {"forward": 2 * (made.inputs + 1) + saved, "backward": 4 * (made.inputs + 1) + saved}
            shown = []
            for direction, (total, special) in work(made).items():
                us = 1e6 * (forward if direction == "forward" else both - forward)
                bytes_us = 1e6 * elements * moved[direction] / bandwidth
                lanes = card.multi_processor_count * clock
                issue_us = 1e6 * elements * max(total / LANES, special / SPECIAL) / lanes
                ratio = us / max(bytes_us, issue_us)
                worst = max(worst, ratio)
                row = {
                    "seed": seed, "direction": direction, "us": us, "byte_us": bytes_us, "instruction_us": issue_us,
                    "instructions": total, "special": special, "ratio": ratio, "shape": shape, "tuned": options.tune,
                    "slots": made.slots, "inputs": made.inputs, "params": made.params, **passes, **found, **facts,
                }  # fmt: skip
                file.write(json.dumps(row) + "\n")
                shown.append(f"{us:7.1f} {bytes_us:7.1f} {issue_us:7.1f} {ratio:5.2f}")
            file.flush()
            kind = f"{made.slots} {made.inputs} {made.params}"
            print(
                f"{seed:4d}: {kind} | {' | '.join(shown)} | {info.iterations} {info.iterations_mean:.2f} | {found['status']} "
                f"{found['error']:.1e} {found['gradient_error']:.1e}",
                flush=True,
            )
    print(f"largest ratio {worst:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
