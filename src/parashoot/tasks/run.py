"""Training: trials one after another, a line of JSON in the results file as each ends; what is there already is not run again."""

from __future__ import annotations

import contextlib
import json
import math
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..bench.results import facts
from ..bench.rows import Row, add_rows, open_rows, read_rows
from ..errors import bad_value
from ..layers import RNN
from ..lm.processes import choose_device
from ..lm.watch import solver_statistics
from ..plan import MultipleShooting, Sequential, Solver
from .models import build_model
from .step import Batches, Update
from .suite import Trial
from .task import Samples, rates, tally

LOGITS = 2**25  # the most that one pass of an evaluation forms
POSITIONS = 2**15  # the most that one takes on a CPU, where more at once are slower
PROBED = MultipleShooting(chunk_length=16, backend="torch")  # sweeps of Newton's method, in PyTorch operations
LATER = {
    "curriculum": [],
    "learned": 0.95,
    "stop_early": True,
    "metric": None,
    "probe": None,
    "initial_bias": {},
    "initial_recurrent": {},
}  # fields that older rows lack


def run(trials: Sequence[Trial], out: Path, *, device: str | None = None, minutes: float = math.inf) -> list[Row]:
    """Run the trials that the results file `out` lacks, appending to it, and return the rows of all of them.

    A rate is left out where an earlier one of the same task, model and seed has a perfect validation score. A training that takes `minutes`
    ends there, is tested, and its row says that time stopped it. Ctrl-C loses the trial that is running, and no other. Raises
    `ArgumentError`.
    """
    if not minutes > 0:
        bad_value("minutes", repr(minutes), "a number > 0")
    place = choose_device(device)
    for trial in trials:  # hours before its turn comes
        vocabulary = trial.samples("train", trial.length).vocab_size
        with torch.device("meta"):
            _new_model(trial, vocabulary)
    open_rows(out, "--out")
    there = lambda: {_key(row): row for row in read(out, "--out")} if out.is_file() else {}
    found, ground = there(), facts(place)
    for number, trial in enumerate(trials, 1):
        perfect = {_but_rate(row["trial"]) for row in found.values() if row["validation"] == 1.0}
        if trial.key in found or _but_rate(trial.to_dict()) in perfect:
            continue
        text = f"[{number}/{len(trials)}] {trial.task} {trial.model} seed {trial.seed} rate {trial.learning_rate:g}"
        row = {**train(trial, place, text, minutes), **ground}
        add_rows(out, [row])
        found |= {trial.key: row} | there()  # other processes add theirs
    keys = {trial.key for trial in trials}
    return [row for key, row in found.items() if key in keys]


def _key(row: Row) -> str:
    return json.dumps(row["trial"], sort_keys=True)


def _but_rate(trial: dict[str, Any]) -> str:
    return json.dumps({k: v for k, v in trial.items() if k != "learning_rate"}, sort_keys=True)


def read(path: Path, argument: str = "FILE") -> list[Row]:
    """The last row of each trial in a results file, in order of first appearance; a last line that was cut off is left out.

    Raises `ArgumentError` for any other.
    """
    rows: dict[str, Row] = {}

    def add(row: Row) -> None:
        _ = (
            row["trial"]["task"],
            row["test"],
            row["validation"],
            row["metric"],
            row["curve"],
            row["stopped"],
            row["seconds"],
        )
        row["trial"] = {**LATER, **row["trial"]}
        rows[_key(row)] = row

    read_rows(path, argument, "parashoot tasks run", "trial", add)
    return list(rows.values())


def train(trial: Trial, device: torch.device, text: str = "", minutes: float = math.inf) -> Row:
    """Train, for `minutes` at most, and test one model: its row, with the validation score and how the recurrence was solved as training
    went on."""
    torch.manual_seed(trial.seed)
    stages = [trial.samples("train", length) for length in (*trial.curriculum, trial.length)]
    data, validation = stages.pop(0), trial.samples("validation", trial.length)
    model = _new_model(trial, data.vocab_size).to(device)
    update, batches = Update(model, trial, device), Batches(trial, device)
    metric, curve, losses, stopped, score = trial.metric or data.task.metric, [], [], "steps", 0.0
    probe = None if trial.probe is None else trial.samples("validation", trial.probe).batch(0, 4)[0].to(device)
    right = torch.zeros((), device=device)  # of last answers, in a running mean
    begun, measured = time.perf_counter(), 0.0
    interval = 0.2 if sys.stderr.isatty() else 15.0
    with tqdm(total=trial.steps, desc=text, unit="step", mininterval=interval, dynamic_ncols=True) as bar:
        for step in range(1, trial.steps + 1):
            x, y = batches(data, step - 1)
            loss, last = update(x, y, trial.learning_rate_at(step - 1))
            losses.append(loss)
            bar.update()
            if stages:
                right.lerp_(last, 0.1)
                if step % 10 == 0 and right > trial.learned:
                    data = stages.pop(0)
                    right.zero_()
            late = time.perf_counter() - begun > 60 * minutes
            if step % trial.validate_every and step < trial.steps and not late:
                continue
            mean, losses = float(torch.stack(losses).mean()), []  # waits for the training that is queued on a GPU
            since = time.perf_counter()
            if not math.isfinite(mean):
                stopped, score = "diverged", 0.0
                break
            score = evaluate(model, validation, trial.validation_samples, device)[metric]
            curve.append(
                {
                    "step": step,
                    "length": x.shape[1],
                    "loss": mean,
                    "validation": score,
                    "solver": _solved(model, x) if probe is None else _probed(model, probe),
                }
            )
            bar.set_postfix_str(f"loss {mean:.4f}, {metric} accuracy {score:.4f}")
            measured += time.perf_counter() - since
            if score == 1.0 and trial.stop_early:
                stopped = "perfect"
                break
            if late and step < trial.steps:
                stopped = "time"
                break
    seconds = time.perf_counter() - begun - measured
    test = {str(n): evaluate(model, trial.samples("test", n), trial.test_samples, device) for n in trial.test_lengths}
    return {
        "trial": trial.to_dict(), "metric": metric, "validation": score, "test": test, "stopped": stopped, "steps": step,
        "seconds": round(seconds, 3), "parameters": sum(p.numel() for p in model.parameters()), "curve": curve,
    }  # fmt: skip


def _new_model(trial: Trial, vocab_size: int) -> Any:
    names = ("hidden_size", "num_layers", "num_heads", "recurrent_clip", "initial_bias", "initial_recurrent", "solver")
    return build_model(trial.model, vocab_size, **{name: getattr(trial, name) for name in names})


@contextlib.contextmanager
def _with_solver(layers: list[RNN], solver: Solver | None) -> Iterator[None]:
    own = [layer.solver for layer in layers]
    for layer in layers:
        layer.solver = solver
    try:
        yield
    finally:
        for layer, before in zip(layers, own, strict=True):
            layer.solver = before


def _solved(model: Any, x: Tensor) -> dict[str, float]:
    """Sweeps, defect and largest Lyapunov exponent of the recurrent layers on a batch, the largest of each."""
    layers = model.recurrent_layers()
    found = solver_statistics(model, x[:16], None, exponents=True) if layers else []
    return {name: max(layer[name] for layer in found) for name in (found[0] if found else ())}


def _probed(model: Any, x: Tensor) -> dict[str, float]:
    """`_solved` in chunks of 16, and how many times faster than as a loop forward and backward passes are as the library plans them."""
    layers = model.recurrent_layers()
    if not layers:
        return {}
    with _with_solver(layers, PROBED):
        found = _solved(model, x)
    seconds = []
    for solver in (None, Sequential()):
        with _with_solver(layers, solver):
            seconds.append(min(_passes(model, x) for _ in range(3)))
    return {**found, "speedup": seconds[1] / seconds[0]}


def _passes(model: Any, x: Tensor) -> float:
    """Seconds of a forward and a backward pass that leave nothing behind."""
    begun = time.perf_counter()
    grads = torch.autograd.grad(model(input_ids=x).logits.square().mean(), list(model.parameters()))
    float(grads[0].sum())  # waits for them
    return time.perf_counter() - begun


@torch.no_grad()
def evaluate(model: nn.Module, samples: Samples, count: int, device: torch.device) -> dict[str, float]:
    """The share of right answers over the first `count` samples, by metric."""
    most = LOGITS // samples.vocab_size
    size = max(1, (min(most, POSITIONS) if device.type == "cpu" else most) // samples.length)
    model.eval()
    total = torch.zeros(3, 2, dtype=torch.int64, device=device)
    for start in range(0, count, size):
        x, y = (v.to(device) for v in samples.batch(start, min(size, count - start)))
        total += tally(model(input_ids=x).logits.argmax(-1), y)
    model.train()
    return rates(total)
