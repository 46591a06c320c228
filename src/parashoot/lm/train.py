"""Training: a loop that can be interrupted or killed at any step and continued with the same result, on one process or many.

Files of a run in its directory: `step-000100` and its like (checkpoints), `latest`, log.jsonl (a line a step), tokenizer.json if the
data have one, and at the end report.json and loss.png.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DivergedError, bad_value, needs
from ..lock import held
from . import checkpoint
from .data import TOKENIZER, Data, Windows, open_data
from .interrupt import Interrupt
from .log import LOG, TENSORBOARD, Log, cut_log
from .processes import Processes, precision
from .train_config import FREE, TrainConfig
from .update import Batch, Late, Training, between, mark
from .watch import first_non_finite, last_non_finite_gradient, solver_statistics

CURVE, REPORT = "loss.png", "report.json"


@dataclass
class Run(Training):
    """A run as it stands: after `step` updates and `seconds` of training, the last one done at the mark `clock`. `saved`: its last
    checkpoint, None before the first; `interrupted` by a signal."""

    directory: Path
    data: Data
    windows: Windows
    step: int = 0
    seconds: float = 0.0
    saved: Path | None = None
    interrupted: bool = False
    clock: Any = None

    @property
    def tokens_per_second(self) -> float:
        return self.step * self.config.batch_size * self.config.sequence_length / max(self.seconds, 1e-9)


@dataclass
class Queued:
    """Update number `step`, under way on the device: its batch, the facts known already and the `values` that come late."""

    step: int
    batch: Batch
    facts: dict[str, Any]
    values: Late


def train(
    config: TrainConfig,
    directory: str | Path,
    group: Processes,
    *,
    resume: bool = False,
    overwrite: bool = False,
    on_start: Callable[[Run], None] | None = None,
) -> Run:
    """Train to `config.steps`, or until Ctrl-C or SIGTERM, which save a checkpoint (then `run.interrupted` is True).

    - `directory`: where the run's files go. With a run in it, either `resume` continues exactly where its last checkpoint was
      written (before the first one: from the start), or `overwrite` starts anew; neither is an error.
    - `group`: the processes that train together, from `processes()`; each calls this.
    - `on_start` receives the run before its first step.

    The device never waits for the host: the results of a step are read, checked and logged while the next one runs, and before a
    checkpoint. Raises `ArgumentError`; `DivergedError` naming the step and the layer where a number was not finite; `CheckpointError`.
    """
    with _alone(Path(directory), group):
        return _train(_open(config, Path(directory), group, resume, overwrite), on_start)


def _train(run: Run, on_start: Callable[[Run], None] | None) -> Run:
    config, group = run.config, run.group
    if on_start is not None:
        on_start(run)
    log = Log(run.directory, run.step, config.steps, tensorboard=config.tensorboard, speaks=group.rank == 0)
    queued: list[Queued] = []
    with Interrupt() as interrupt, log:
        run.clock = mark(run.device)
        while run.step < config.steps and not run.interrupted:
            queued.append(_queue(run))
            run.step += 1
            run.interrupted = group.any(interrupt.received)
            due = run.step % config.checkpoint_every == 0 or run.step == config.steps or run.interrupted
            while len(queued) > (0 if due else 1):
                log.write(_result(run, queued.pop(0)))
            if due:
                _save(run)
                run.clock = mark(run.device)
    _release(run)
    return run


def _queue(run: Run) -> Queued:
    """Start one update."""
    config, step, facts = run.config, run.step, {}
    batch = run.batch(*run.windows.draw(config.batch_size, run.group.rank, run.group.size))
    if step % config.statistics_every == 0:
        with precision(run.group, run.bf16):
            facts["solver"] = solver_statistics(run.model, *batch[0])
    rate = config.learning_rate_at(step)
    return Queued(step + 1, batch, {"learning_rate": rate, **facts}, run.update(batch, rate))


def _result(run: Run, queued: Queued) -> dict[str, Any]:
    """Wait for an update; what to log of it. Raises `DivergedError` on all processes if a number is not finite."""
    loss, extra, norm = queued.values.read()
    _check_finite(run, queued, {"loss": loss, "gradient norm": norm})
    config, tokens, there = run.config, run.windows.tokens, queued.values.there
    seconds, run.clock = between(run.clock, there), there
    run.seconds += seconds
    facts = {"step": queued.step, "loss": loss, "grad_norm": norm, **queued.facts}
    if config.z_loss:
        facts["log_partition_squared"] = extra / config.z_loss
    facts["bits_per_byte"] = loss * len(tokens) / tokens.bytes / math.log(2)
    facts["tokens_per_s"] = config.batch_size * config.sequence_length / seconds
    return facts


def _check_finite(run: Run, queued: Queued, values: dict[str, float]) -> None:
    """If a value is not finite, compute the batch again, the weights being those from before it, and name where that begins."""
    wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if not wrong:
        return
    _release(run)
    forward = first_non_finite(run.model, lambda: run.passes(queued.batch))
    found = run.group.gather((forward, last_non_finite_gradient(run.model)))  # each process has a part of a gradient
    outputs, gradients = ([name for name in names if name] for names in zip(*found, strict=True))
    where = f"the output of {outputs[0]}" if outputs else f"the gradient of {gradients[0]}" if gradients else "the loss"
    kept = f"the checkpoint {run.saved} is kept" if run.saved is not None else "no checkpoint was due yet"
    raise DivergedError(
        f"{wrong[0]} at step {queued.step}, first in {where}; {kept}. "
        f"Lower learning_rate ({run.config.learning_rate:g}) or lengthen warmup ({run.config.warmup:g})."
    )


def _release(run: Run) -> None:
    """Give the memory of passes back, for what comes after them."""
    if run.captured is not None:
        run.captured.release()


def holds_run(directory: Path) -> bool:
    """Whether a run was begun in `directory`."""
    return any((directory / name).exists() for name in (checkpoint.LATEST, LOG))


@contextlib.contextmanager
def _alone(directory: Path, group: Processes) -> Iterator[None]:
    """With the directory held by this run: another in it is refused."""
    if directory.exists() and not directory.is_dir():
        bad_value("directory", f"'{directory}', a file", "a directory for the run")
    if group.rank:
        yield
        return
    new = not directory.exists()
    directory.mkdir(parents=True, exist_ok=True)
    try:
        with held(directory) as mine:
            if not mine:
                bad_value("directory", f"'{directory}', in which another process trains", "a directory of its own")
            yield
    finally:
        if new and not any(directory.iterdir()):
            directory.rmdir()


def _open(config: TrainConfig, directory: Path, group: Processes, resume: bool, overwrite: bool) -> Run:
    config.micro_batch(group.size)
    if config.tensorboard:  # before anything is removed
        needs("a TensorBoard log", "tensorboard", "tensorboard")
    saved = (directory / checkpoint.LATEST).exists()
    path = checkpoint.find(directory) if resume and (saved or not holds_run(directory)) else None
    if holds_run(directory) and not (resume or overwrite):
        bad_value(
            "directory", f"'{directory}', which holds a run", "a new directory",
            "Pass resume to continue it or overwrite to lose it.",
        )  # fmt: skip
    data = open_data(config.data).fitting(config.model.vocab_size)
    if data.tokenizer is not None and data.tokenizer.parent.resolve() == directory.resolve():
        bad_value("directory", f"'{directory}', which holds the data", "another directory")
    own = [*checkpoint.steps(directory), *(directory / name for name in (TENSORBOARD, CURVE, REPORT, TOKENIZER))]
    there = [p.name for p in own if p.exists() and not _same(p, data.tokenizer)]
    if there and not holds_run(directory):
        bad_value("directory", f"'{directory}', with {', '.join(there)} of no run", "a directory without", "Move them.")
    windows = Windows(data.split("train"), config.sequence_length, config.seed)
    run = Run.start(config, group, drawn=path is None, directory=directory, data=data, windows=windows)
    group.barrier()  # all have looked at what is there
    if path is not None:
        _restore(run, path)
    elif group.rank == 0:
        for old in own:
            shutil.rmtree(old, ignore_errors=True) if old.is_dir() else old.unlink(missing_ok=True)
        for name in (checkpoint.LATEST, LOG):
            (directory / name).unlink(missing_ok=True)
        if data.tokenizer is not None:
            shutil.copyfile(data.tokenizer, directory / f"{TOKENIZER}.partial")
            os.replace(directory / f"{TOKENIZER}.partial", directory / TOKENIZER)
    group.barrier()
    return run


def _same(path: Path, other: Path | None) -> bool:
    return path.is_file() and other is not None and path.read_bytes() == other.read_bytes()


def _save(run: Run) -> None:
    rest = {
        "config": run.config.to_dict(), "seconds": run.seconds, "windows": run.windows.state_dict(),
        "data": run.data.fingerprint,
    }  # fmt: skip
    run.saved = checkpoint.save(
        run.directory, run.step, run.model, run.optimizer, rest, run.config.keep_checkpoints, run.group
    )


def _restore(run: Run, path: Path) -> None:
    saved = checkpoint.facts(path)
    mine, its = run.config.to_dict(), TrainConfig.from_dict(saved["config"]).to_dict()
    changed = [k for k, v in mine.items() if k not in FREE and its[k] != v]
    if changed:
        values = ", ".join(f"{k} = {mine[k]!r} (saved: {its[k]!r})" for k in changed)
        bad_value("config", values, f"the values of the checkpoint {path}", "Or start a new run.")
    if saved["data"] != run.data.fingerprint:
        bad_value("data", "other data than the checkpoint's", "the same data", "Or start a new run.")
    checkpoint.load(path, run.model, run.optimizer, run.group)
    run.windows.load_state_dict(saved["windows"])
    run.step, run.seconds, run.saved = saved["step"], saved["seconds"], path
    if run.group.rank == 0:
        cut_log(run.directory, run.step)
