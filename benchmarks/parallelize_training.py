"""Training a torch.nn.GRU or LSTM on sequences of 16,384 steps, plainly and parallelized: loss, accuracy, time and passes by epoch.

- `mackey`: which of four delays (13, 17, 23, 30) generated a Mackey-Glass series (Science 197, 1977), seen through noise: one label a
  sequence, from the mean of the outputs.
- `flipflop`: three bits to remember (Sussillo and Barak 2013): each step, each with probability 0.01, a pulse sets a bit to +1 or -1, and
  every step's output has to tell all three. What is remembered lasts for hundreds of steps.

Both ways start from the same weights and see the same batches; they differ by rounding, which training amplifies: compare over seeds.
After each epoch the parallelized module's outputs and gradients are compared with those of the plain one that has the same weights.

    python benchmarks/parallelize_training.py [--tasks mackey flipflop] [--seeds 3] [--epochs 6 --batches 16] [--device cpu --quick] [--out FILE]
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from parallelize import off, results
from torch import Tensor, nn

import parashoot as ps
from parashoot.bench.results import facts

DELAYS = (13, 17, 23, 30)
HELD_OUT = 4  # batches
KINDS = {"gru": nn.GRU, "lstm": nn.LSTM}


def mackey(batch: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """dx/dt = 0.2 x(t - d) / (1 + x(t - d)^10) - 0.1 x(t), by Euler steps of 1: noisy series (B, T, 1), index of d (B,)."""
    label = torch.randint(len(DELAYS), (batch,), generator=generator)
    delay, warm = torch.tensor(DELAYS)[label], 300
    x = torch.empty(steps + warm, batch)
    x[: max(DELAYS) + 1] = 0.9 + 0.4 * torch.rand(max(DELAYS) + 1, batch, generator=generator)
    sequences = torch.arange(batch)
    for t in range(max(DELAYS), steps + warm - 1):
        late = x[t - delay, sequences]
        x[t + 1] = x[t] + 0.2 * late / (1 + late**10) - 0.1 * x[t]
    x = 4 * (x[warm:].T - 0.9)
    return (x + 0.3 * torch.randn(x.shape, generator=generator)).unsqueeze(2), label


def flipflop(batch: int, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Pulses (B, T, 3) in {-1, 0, 1}, and the sign of the last pulse of each channel (B, T, 3) as 0 or 1."""
    shape = (batch, steps, 3)
    pulse = (torch.rand(shape, generator=generator) < 0.01).float()
    pulse[:, 0] = 1.0
    x = pulse * (2.0 * torch.randint(2, shape, generator=generator) - 1)
    at = (pulse * torch.arange(steps)[:, None]).cummax(1).values.long()
    return x, (x.gather(1, at) + 1) / 2


TASKS = {"mackey": (mackey, 1, len(DELAYS)), "flipflop": (flipflop, 3, 3)}


def judge(task: str, out: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Loss and accuracy of outputs (B, T, K)."""
    if task == "mackey":
        logits = out.mean(1)
        return nn.functional.cross_entropy(logits, target), (logits.argmax(1) == target).float().mean()
    return nn.functional.binary_cross_entropy_with_logits(out, target), ((out > 0) == (target > 0.5)).float().mean()


def train(task: str, way: str, seed: int, options: argparse.Namespace, data: list, device: torch.device):
    """One row an epoch, with the accuracy over the last batches, which are not trained on."""
    torch.manual_seed(seed)
    _, inputs, outputs = TASKS[task]
    own = KINDS[options.kind](inputs, options.hidden, batch_first=True).to(device)
    head = nn.Linear(options.hidden, outputs).to(device)
    rnn = own if way == "plain" else ps.parallelize(own)
    parameters = [*rnn.parameters(), *head.parameters()]
    optimizer = torch.optim.Adam(parameters, lr=options.lr)
    steps = options.epochs * options.batches
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / steps)
    for epoch in range(options.epochs):
        losses, records = [], []
        if device.type == "cuda":
            torch.cuda.synchronize()
        begun = time.perf_counter()
        for x, target in data[:-HELD_OUT]:
            loss, _ = judge(task, head(rnn(x)[0]), target)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
            records += [(r.chunk_length, r.passes, r.backward_passes) for r in getattr(rnn, "info", ())]
        loss = float(torch.stack(losses).mean())
        seconds = time.perf_counter() - begun
        with torch.no_grad():
            x, target = (torch.cat(v) for v in zip(*data[-HELD_OUT:], strict=True))
            accuracy = float(judge(task, head(rnn(x)[0]), target)[1])
        errors = (0.0, 0.0)
        if way == "parallel":
            x = data[-1][0]
            errors = off(results(rnn, x, True), results(own, x, True), 3 if options.kind == "lstm" else 2)
        yield {
            "task": task, "way": way, "seed": seed, "kind": options.kind, "hidden": options.hidden, "time": options.time,
            "batch": options.batch, "epoch": epoch, "loss": loss, "accuracy": accuracy, "seconds": seconds, "records": records,
            "error": errors[0], "gradient_error": errors[1],
        }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--kind", choices=KINDS, default="gru")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--batches", type=int, default=16, help="in an epoch")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--time", type=int, default=16384)
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--lr", type=float, default=1e-2, help="at first; it falls linearly to 0")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="short sequences, a narrow module, one seed")
    parser.add_argument("--commit", metavar="HASH", help="what the rows call this version (default: git's)")
    parser.add_argument("--out", type=Path, help="rows are added to this file, one JSON object a line")
    options = parser.parse_args()
    if options.quick:
        options.time, options.hidden, options.seeds, options.batch, options.batches = 2048, 32, 1, 4, 4
    device = torch.device(options.device)
    torch.backends.cudnn.allow_tf32 = False
    where = facts(device, options.commit)
    print(f"{where['device']}, commit {where['commit']}, torch {torch.__version__}")
    for task in options.tasks:
        for seed in range(options.seeds):
            generator = torch.Generator().manual_seed(seed)
            make = TASKS[task][0]
            made = make(options.batch * (options.batches + HELD_OUT), options.time, generator)
            data = list(zip(*(v.to(device).split(options.batch) for v in made), strict=True))
            for epochs in zip(
                *(train(task, way, seed, options, data, device) for way in ("plain", "parallel")), strict=True
            ):
                plain, parallel = epochs
                lengths, passes, back = (
                    sum(v) / len(parallel["records"]) for v in zip(*parallel["records"], strict=True)
                )
                print(
                    f"{task} seed {seed} epoch {plain['epoch']}: loss {plain['loss']:.4f} / {parallel['loss']:.4f}, accuracy "
                    f"{plain['accuracy']:.3f} / {parallel['accuracy']:.3f}, {plain['seconds']:.2f} / {parallel['seconds']:.2f} s "
                    f"({plain['seconds'] / parallel['seconds']:.1f}x), chunks of {lengths:.0f}, {passes:.1f} + {back:.1f} passes, "
                    f"off by {parallel['error']:.1e}, gradients {parallel['gradient_error']:.1e}",
                    flush=True,
                )
                if options.out:
                    with options.out.open("a") as file:
                        file.writelines(json.dumps({**row, **where}) + "\n" for row in epochs)


if __name__ == "__main__":
    main()
