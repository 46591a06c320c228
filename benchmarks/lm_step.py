"""One training step of a language model, as `parashoot train` runs it, on random tokens: time, tokens a second, MFU, memory.

A model is the name of a preset and changes to it: `400M`, `400M:lstm` (a cell, or else a mixer), `7B:cell=gru,num_heads=8`; or a recipe,
`recipes/enwik8-paragru.json`. A shape is windows x tokens, over all processes together. MFU is 6 N tokens / (time x processes x
989 TFLOP/s), N the parameters without the input embedding, for the dense bf16 peak of an H100 or H200; what attention costs beyond its
matrices is not counted. Times are medians over the steps after the first three, in which all is compiled and captured in a CUDA graph
("ready"); memory is the peak of one process.

    python benchmarks/lm_step.py --models 400M:gru 400M:lstm --shapes 16x2048 2x16384 --compile [--out lm-step.jsonl]
    torchrun --nproc-per-node 2 benchmarks/lm_step.py --models 7B --shapes 4x2048 --compile --checkpointed
    python benchmarks/lm_step.py --models demo:gru --shapes 2x64 --device cpu --steps 2 --profile
    python benchmarks/lm_step.py --table benchmarks/results/lm-step.jsonl
"""

from __future__ import annotations

import argparse
import gc
import itertools
import json
import resource
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from parashoot import cells
from parashoot.bench.results import facts, markdown
from parashoot.lm.config import ParaRNNConfig
from parashoot.lm.models import model_config
from parashoot.lm.presets import preset
from parashoot.lm.processes import Processes, processes
from parashoot.lm.train_config import TrainConfig
from parashoot.lm.update import Batch, Late, Training, between, mark

PEAK = 989e12  # FLOP/s of an H100 or H200 in dense bf16
WARM = 3
Interval = tuple[str, float, float]


def find_model(text: str) -> ParaRNNConfig:
    """The configuration in a recipe (a .json file), or that "PRESET:CHANGES" names; a change is NAME=VALUE, or a bare cell or mixer."""
    if text.endswith(".json"):
        return model_config(json.loads(Path(text).read_text())["model"])
    name, _, changes = text.partition(":")
    pairs = [
        c.split("=", 1) if "=" in c else ["cell" if hasattr(cells, c) else "mixer", c] for c in changes.split(",") if c
    ]
    return preset(name, **{key: _value(value) for key, value in pairs})


def _value(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return text


def shape(text: str) -> tuple[int, int]:
    batch, _, length = text.partition("x")
    return int(batch), int(length)


def random_batch(training: Training) -> Batch:
    c = training.config
    return training.batch(
        torch.randint(c.model.vocab_size, (c.batch_size // training.group.size, c.sequence_length)), None
    )


def timed(training: Training, steps: int) -> list[float]:
    """Seconds of each step, the results of one read while the next one runs, as in training."""
    late: list[Late] = []
    marks = [mark(training.device)]
    for _ in range(steps):
        late.append(training.update(random_batch(training), training.config.learning_rate))
        marks.append(mark(training.device))
        if len(late) > 1:
            late.pop(0).read()
    if bool(training.failed):
        raise SystemExit("a loss or a gradient was not finite")
    return [between(*pair) for pair in itertools.pairwise(marks)]


def peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU at most, or the process's largest size so far on the CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def measure(
    options: argparse.Namespace, group: Processes, name: str, model: ParaRNNConfig, batch: int, length: int
) -> dict[str, Any]:
    """A row; one with "failed" if the memory does not suffice."""
    config = TrainConfig(
        model, steps=1, batch_size=batch, sequence_length=length, learning_rate=1e-4, precision=options.precision,
        micro_batch_size=options.micro, compile=options.compile, activation_checkpointing=options.checkpointed,
    )  # fmt: skip
    row: dict[str, Any] = {
        "model": name, "batch": batch, "length": length, "micro_batch": config.micro_batch(group.size), "processes": group.size,
        "compile": options.compile, "checkpointed": options.checkpointed,
    }  # fmt: skip
    if group.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(group.device)
    training = None
    try:
        begun = time.perf_counter()
        training = Training.start(config, group)
        count = sum(p.numel() for p in training.model.parameters())
        embedding = training.model.get_input_embeddings().weight
        inner = count - (embedding.numel() if embedding is not training.model.get_output_embeddings().weight else 0)
        row |= {"precision": "bf16" if training.bf16 else "fp32", "parameters": count, "without_embedding": inner}
        timed(training, WARM)
        row["ready_s"] = time.perf_counter() - begun
        times = timed(training, options.steps)
        second = statistics.median(times)
        row |= {"ms": second * 1e3, "fastest_ms": min(times) * 1e3, "slowest_ms": max(times) * 1e3}
        row["tokens_per_s"] = batch * length / second
        row |= {"mfu": 6 * inner * row["tokens_per_s"] / (PEAK * group.size), "peak_flops": PEAK}
        row["memory_gib"] = peak_memory(group.device)
        if options.profile:
            row["profile"] = profiled(training)
    except torch.OutOfMemoryError as e:
        row |= {"failed": "out of memory", "why": str(e).splitlines()[0][:200], "memory_gib": peak_memory(group.device)}
    del training
    torch.compiler.reset()
    gc.collect()  # a graph that did not reach backward
    if group.device.type == "cuda":
        torch.cuda.empty_cache()
    return row


def profiled(training: Training) -> dict[str, Any]:
    """Where the time of two steps goes; on a CPU operators stand for kernels."""
    gpu = training.device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if gpu else ProfilerActivity.CPU]) as profiler:
        timed(training, 2)
    wanted = DeviceType.CUDA if gpu else DeviceType.CPU
    found = [e for e in profiler.events() or [] if e.device_type == wanted and not e.is_user_annotation]
    return shares((e.name, e.time_range.start, e.time_range.end) for e in found if gpu or not e.cpu_children)


def shares(ran: Iterable[Interval], top: int = 40) -> dict[str, Any]:
    """From the intervals (name, start, end) of kernels, in microseconds: the `top` names by total time, with calls, ms and share of the
    whole span, and the share of the span in which none ran. Kernels of several streams may overlap."""
    ran = sorted(ran, key=lambda k: k[1])
    if not ran:
        return {"kernels": [], "idle": 1.0}
    span, busy, reached = max(end for *_, end in ran) - ran[0][1], 0.0, ran[0][1]
    total, calls = Counter[str](), Counter[str]()
    for name, start, end in ran:
        busy, reached = busy + max(0.0, end - max(start, reached)), max(reached, end)
        total[name] += end - start  # type: ignore[assignment]
        calls[name] += 1
    kernels = [{"name": n, "calls": calls[n], "ms": t / 1e3, "share": t / span} for n, t in total.most_common(top)]
    return {"kernels": kernels, "idle": 1 - busy / span, "span_ms": span / 1e3}


def show(row: dict[str, Any]) -> None:
    head = f"{row['model']:24} {row['batch']:>4} x {row['length']:<6}"
    if "failed" in row:
        print(f"{head} {row['failed']}: {row['why']}", flush=True)
        return
    print(
        f"{head} {row['parameters'] / 1e6:8.0f}M {row['ms']:9.1f} {row['tokens_per_s']:10,.0f} {row['mfu']:6.1%} "
        f"{row['memory_gib']:8.1f} {row['ready_s']:7.1f}",
        flush=True,
    )
    if "profile" in row:
        print(
            f"  nothing ran for {row['profile']['idle']:.1%} of {row['profile']['span_ms']:.1f} ms (two steps, profiled)"
        )
        for k in row["profile"]["kernels"]:
            print(f"  {k['share']:6.1%} {k['ms']:9.2f} ms {k['calls']:6} x {k['name'][:100]}", flush=True)


def table(path: Path) -> str:
    """The newest row of each model, shape and kind of GPU in a results file, as Markdown."""
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    newest = {(r["model"], r["batch"], r["length"], r["processes"], r["device"]): r for r in rows if "ms" in r}
    lines = [["model", "batch x tokens", "device", "ms a step", "tokens/s", "MFU", "GiB on each", "commit"]]
    order = lambda item: (item[1]["device"], item[0][2], item[1]["parameters"])
    for (model, batch, length, size, device), r in sorted(newest.items(), key=order):
        figures = [
            f"{r['ms']:.0f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{r['mfu']:.1%}",
            f"{r['memory_gib']:.1f}",
            r["commit"],
        ]
        where = f"{size} x {device}" if size > 1 else device
        lines.append([model, f"{batch} x {length}", where, *figures])
    return markdown(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="One training step of language models, also under torchrun.")
    parser.add_argument("--models", nargs="+", default=["400M:gru", "400M:lstm"], metavar="PRESET:CHANGES")
    parser.add_argument("--shapes", nargs="+", type=shape, default=[(16, 2048), (2, 16384)], metavar="BxT")
    parser.add_argument("--steps", type=int, default=10, help="steps to time (default: 10)")
    parser.add_argument("--micro", type=int, metavar="N", help="windows a process takes at a time")
    parser.add_argument("--compile", action="store_true", help="compile each block")
    parser.add_argument("--checkpointed", action="store_true", help="keep only the blocks' inputs for backward")
    parser.add_argument("--precision", choices=("bf16", "fp32"), help="default: bf16 on a GPU, fp32 on a CPU")
    parser.add_argument(
        "--profile", action="store_true", help="also the 40 longest kernels, and the share of time without any"
    )
    parser.add_argument("--device", help="cpu, cuda, ... (default: a GPU if there is one)")
    parser.add_argument("--commit", metavar="HASH", help="what the rows call this version (default: git's)")
    parser.add_argument("--out", type=Path, help="rows are added to this file, one JSON object a line")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="measure nothing: print the rows of this file as Markdown"
    )
    options = parser.parse_args()
    if options.table:
        print(table(options.table))
        return
    models = {name: find_model(name) for name in options.models}
    with processes(options.device) as group:
        where = facts(group.device, options.commit)
        if group.rank == 0:
            print(f"{group.size} x {where['device']}, commit {where['commit']}, torch {where['versions']['torch']}")
            print(
                f"{'model':24} {'shape':>13} {'params':>9} {'ms':>9} {'tokens/s':>10} {'MFU':>6} {'GiB':>8} {'ready s':>7}"
            )
        for name, model in models.items():
            for batch, length in options.shapes:
                row = measure(options, group, name, model, batch, length)
                if group.rank == 0:
                    show(row)
                    if options.out:
                        with options.out.open("a") as file:
                            file.write(json.dumps({**row, **where}) + "\n")
                if "failed" in row and group.size > 1:
                    sys.exit(1)  # the other processes may wait for this one's part of a sum: torchrun ends them


if __name__ == "__main__":
    main()
