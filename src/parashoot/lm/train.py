"""Training: a loop that can be interrupted or killed at any step and continued with the same result, on one process or many.

Files of a run in its directory: `step-000100` and its like (checkpoints), `latest`, log.jsonl (a line a step), tokenizer.json if the
data have one, and at the end report.json and loss.png.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..errors import DivergedError, bad_value
from . import checkpoint
from .data import TOKENIZER, Data, Windows, open_data
from .interrupt import Interrupt
from .log import LOG, TENSORBOARD, Log, cut_log
from .models import build_model, parameter_groups
from .processes import Processes, place, precision
from .train_config import FREE, TrainConfig
from .watch import first_non_finite, last_non_finite_gradient, solver_statistics

CURVE, REPORT = "loss.png", "report.json"


@dataclass
class Run:
    """A run as it stands: after `step` updates and `seconds` of training. `saved`: its last checkpoint, None before the first;
    `interrupted` by a signal."""

    config: TrainConfig
    directory: Path
    group: Processes
    data: Data
    model: Any
    optimizer: torch.optim.Optimizer
    windows: Windows
    step: int = 0
    seconds: float = 0.0
    saved: Path | None = None
    interrupted: bool = False

    @property
    def device(self) -> torch.device:
        return self.group.device

    @property
    def bf16(self) -> bool:
        """Whether forward and backward passes compute in bfloat16."""
        return uses_bf16(self.config, self.group)

    @property
    def tokens_per_second(self) -> float:
        return self.step * self.config.batch_size * self.config.sequence_length / max(self.seconds, 1e-9)


def uses_bf16(config: TrainConfig, group: Processes) -> bool:
    """The precision that a configuration asks for, on this device by default."""
    return (config.precision or ("bf16" if group.device.type == "cuda" else "fp32")) == "bf16"


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

    Raises `ArgumentError`; `DivergedError` naming the step and the layer where a number was not finite; `CheckpointError`.
    """
    run = _open(config, Path(directory), group, resume, overwrite)
    if on_start is not None:
        on_start(run)
    bits = len(run.windows.tokens) / run.windows.tokens.bytes / math.log(2)
    log = Log(run.directory, run.step, config.steps, tensorboard=config.tensorboard, speaks=group.rank == 0)
    with Interrupt() as interrupt, log:
        while run.step < config.steps and not run.interrupted:
            start = time.perf_counter()
            facts = _update(run, interrupt)
            seconds = time.perf_counter() - start
            run.step, run.seconds = run.step + 1, run.seconds + seconds
            facts["bits_per_byte"] = facts["loss"] * bits
            facts["tokens_per_s"] = config.batch_size * config.sequence_length / seconds
            log.write({"step": run.step, **facts})
            if run.step % config.checkpoint_every == 0:
                _save(run)
        if run.saved is None or checkpoint.facts(run.saved)["step"] != run.step:
            _save(run)
    return run


def _update(run: Run, interrupt: Interrupt) -> dict[str, Any]:
    """One step of the optimizer, and what to log of it; sets `run.interrupted` on all processes where one got a signal."""
    config, model = run.config, run.model
    batches = _draw(run)
    facts: dict[str, Any] = {}
    if run.step % config.statistics_every == 0:
        with precision(run.group, run.bf16):
            facts["solver"] = solver_statistics(model, *batches[0])
    sums = torch.zeros(2, device=run.device)
    run.optimizer.zero_grad()
    for ids, reset in batches:
        with precision(run.group, run.bf16):
            out = model(input_ids=ids, labels=ids, reset=reset)
        (out.loss / len(batches)).backward()
        extra = out.z_loss if config.z_loss else torch.zeros_like(out.loss)
        sums += torch.stack([(out.loss - extra).detach(), extra.detach()]).float() / len(batches)
    total = nn.utils.get_total_norm([p.grad for p in model.parameters() if p.grad is not None])
    norm = float(total.full_tensor() if isinstance(total, DTensor) else total)
    signals = torch.full_like(sums[:1], float(interrupt.received))
    loss, extra, signals = (run.group.sum(torch.cat([sums, signals])) / run.group.size).tolist()
    _check_finite(run, {"loss": loss, "gradient norm": norm}, batches)
    nn.utils.clip_grads_with_norm_(list(model.parameters()), config.grad_clip, total)
    rate = config.learning_rate_at(run.step)
    for settings in run.optimizer.param_groups:
        settings["lr"] = rate
    run.optimizer.step()
    run.interrupted = signals > 0
    if config.z_loss:
        facts["log_partition_squared"] = extra / config.z_loss
    return {"loss": loss, "grad_norm": norm, "learning_rate": rate, **facts}


def _draw(run: Run) -> list[tuple[Tensor, Tensor | None]]:
    """This process's part of the next batch, in the pieces that one pass takes: ids and reset."""
    ids, reset = run.windows.draw(run.config.batch_size, run.group.rank, run.group.size)
    micro = run.config.micro_batch(run.group.size)
    parts = ids.to(run.device).split(micro)
    resets = reset.to(run.device).split(micro) if reset is not None else [None] * len(parts)
    return list(zip(parts, resets, strict=True))


def _check_finite(run: Run, values: dict[str, float], batches: list[tuple[Tensor, Tensor | None]]) -> None:
    """Raise `DivergedError` on all processes if a value is not finite, naming where that began."""
    wrong = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
    if not wrong:
        return

    def again() -> None:
        with precision(run.group, run.bf16):
            for ids, reset in batches:
                run.model(
                    input_ids=ids, reset=reset, logits_to_keep=1
                )  # all of them would not fit beside the gradients

    gradient = last_non_finite_gradient(run.model)
    forward = [f for f in run.group.gather(first_non_finite(run.model, again)) if f]
    where = f"the output of {forward[0]}" if forward else f"the gradient of {gradient}" if gradient else "the loss"
    kept = f"the checkpoint {run.saved} is kept" if run.saved is not None else "no checkpoint was due yet"
    raise DivergedError(
        f"{wrong[0]} at step {run.step + 1}, first in {where}; {kept}. "
        f"Lower learning_rate ({run.config.learning_rate:g}) or lengthen warmup ({run.config.warmup:g})."
    )


def holds_run(directory: Path) -> bool:
    """Whether a run was begun in `directory`."""
    return any((directory / name).exists() for name in (checkpoint.LATEST, LOG))


def _open(config: TrainConfig, directory: Path, group: Processes, resume: bool, overwrite: bool) -> Run:
    config.micro_batch(group.size)
    saved = (directory / checkpoint.LATEST).exists()
    path = checkpoint.find(directory) if resume and (saved or not holds_run(directory)) else None
    if holds_run(directory) and not (resume or overwrite):
        bad_value(
            "directory", f"'{directory}', which holds a run", "a new directory",
            "Pass resume to continue it or overwrite to lose it.",
        )  # fmt: skip
    data = open_data(config.data).fitting(config.model.vocab_size)
    windows = Windows(data.split("train"), config.sequence_length, config.seed)
    torch.manual_seed(config.seed)
    model = build_model(config.model.replace(z_loss=config.z_loss))
    bf16 = uses_bf16(config, group)
    place(model, group, bf16=bf16, compiled=config.compile, checkpointed=config.activation_checkpointing)
    groups = parameter_groups(model, config.weight_decay / config.learning_rate)  # AdamW multiplies by the rate
    optimizer = torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=True)
    run = Run(config, directory, group, data, model, optimizer, windows)
    if path is not None:
        _restore(run, path)
    elif group.rank == 0:
        directory.mkdir(parents=True, exist_ok=True)
        for old in (*checkpoint.steps(directory), directory / TENSORBOARD):
            shutil.rmtree(old, ignore_errors=True)
        for name in (checkpoint.LATEST, LOG, CURVE, REPORT, TOKENIZER):
            (directory / name).unlink(missing_ok=True)
        if data.tokenizer is not None:
            shutil.copyfile(data.tokenizer, directory / TOKENIZER)
    group.barrier()
    return run


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
