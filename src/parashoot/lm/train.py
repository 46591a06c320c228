"""Training on bytes: a loop that can be interrupted at any step and continued with the same result.

Files of a run in its directory: checkpoint.pt, log.jsonl (a line a step), and at the end report.json and loss.png.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import DivergedError, bad_value
from . import checkpoint
from .data import Windows, load_text, split
from .interrupt import Interrupt
from .model import ParaRNNForCausalLM
from .train_config import TrainConfig

LOG, CURVE, REPORT = "log.jsonl", "loss.png", "report.json"


@dataclass
class Run:
    """A run as it stands: after `step` updates, `seconds` of training, the loss of each update in `losses`.

    `saved_step` is that of the checkpoint, None before the first; `interrupted` by a signal.
    """

    config: TrainConfig
    directory: Path
    device: torch.device
    model: ParaRNNForCausalLM
    optimizer: torch.optim.Optimizer
    windows: Windows
    validation: Tensor
    text_sha256: str
    step: int
    seconds: float
    losses: list[float]
    saved_step: int | None = None
    interrupted: bool = False

    @property
    def checkpoint(self) -> Path:
        return self.directory / checkpoint.NAME

    @property
    def tokens_per_second(self) -> float:
        return self.step * self.config.batch_size * self.config.sequence_length / max(self.seconds, 1e-9)


def train(
    config: TrainConfig,
    directory: str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    device: str | torch.device | None = None,
    on_start: Callable[[Run], None] | None = None,
) -> Run:
    """Train to `config.steps`, or until Ctrl-C or SIGTERM, which save a checkpoint (then `run.interrupted` is True).

    - `directory`: where the run's files go. With a checkpoint in it, either `resume` continues exactly where that was
      written, or `overwrite` starts anew; neither is an error.
    - `device`: None takes a GPU if there is one. On a GPU the passes run under bfloat16 autocast.
    - `on_start` receives the run before its first step.

    Raises `ArgumentError`, and `DivergedError` naming the step at which the loss was not finite.
    """
    run = _open(config, Path(directory), resume, overwrite, choose_device(device))
    if on_start is not None:
        on_start(run)
    with Interrupt() as interrupt, open(run.directory / LOG, "a") as log, _bar(run) as bar:
        while run.step < config.steps and not interrupt.received:
            start = time.perf_counter()
            loss, norm = _update(run)
            run.step, run.seconds = run.step + 1, run.seconds + time.perf_counter() - start
            run.losses.append(loss)
            facts = {"loss": loss, "bits_per_byte": loss / math.log(2), "tokens_per_s": run.tokens_per_second}
            rate = config.learning_rate_at(run.step - 1)
            log.write(json.dumps({"step": run.step, **facts, "learning_rate": rate, "grad_norm": norm}) + "\n")
            log.flush()
            bar.set_postfix_str(
                f"loss {loss:.3f}, {facts['bits_per_byte']:.3f} bits/byte, {facts['tokens_per_s']:,.0f} tokens/s", False
            )
            bar.update()
            if run.step % config.checkpoint_every == 0:
                _save(run)
        if run.saved_step != run.step:
            _save(run)
    run.interrupted = interrupt.received
    return run


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device asked for; for None a GPU if there is one. Raises `ArgumentError` if it is not there."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as e:
        bad_value("device", f"'{device}'", "a device of this machine", f"PyTorch says: {str(e).splitlines()[0][:120]}")
    return found


def parameter_groups(model: ParaRNNForCausalLM, weight_decay: float) -> list[dict[str, Any]]:
    """Matrices, which decay, and the rest: vectors, also where several are stored as one tensor."""
    stacked = ("mixer.conv.weight", "mixer.rnn.bias_l0", "mixer.rnn.weight_hh_l0")
    groups: tuple[list, list] = ([], [])
    for name, p in model.named_parameters():
        groups[p.dim() < 2 or name.endswith(stacked)].append(p)
    return [{"params": groups[0], "weight_decay": weight_decay}, {"params": groups[1], "weight_decay": 0.0}]


def _update(run: Run) -> tuple[float, float]:
    """One step of the optimizer; its loss (nats) and the norm of the gradient before clipping."""
    config, ids = run.config, run.windows.draw().to(run.device)
    rate = config.learning_rate_at(run.step)
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    lower = torch.autocast("cuda", torch.bfloat16) if run.device.type == "cuda" else contextlib.nullcontext()
    with lower:
        loss = run.model(ids, labels=ids).loss
    run.optimizer.zero_grad()
    loss.backward()
    norm = float(nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip))
    for name, value in (("loss", float(loss.detach())), ("gradient norm", norm)):
        if not math.isfinite(value):
            saved = f"the checkpoint of step {run.saved_step} is kept: {run.checkpoint}"
            kept = saved if run.saved_step is not None else "no checkpoint was due yet"
            raise DivergedError(
                f"{name} is {value} at step {run.step + 1}; {kept}. Lower learning_rate ({config.learning_rate:g})."
            )
    run.optimizer.step()
    return float(loss.detach()), norm


def _open(config: TrainConfig, directory: Path, resume: bool, overwrite: bool, device: torch.device) -> Run:
    path = directory / checkpoint.NAME
    if resume:
        if not path.is_file():
            bad_value(
                "resume", f"'{directory}'", f"a directory with a {checkpoint.NAME}", "Start a run there without resume."
            )
        saved = checkpoint.load(path)
    elif path.exists() and not overwrite:
        bad_value(
            "directory",
            f"'{directory}', which holds a run",
            "a new directory",
            "Pass resume to continue it or overwrite to lose it.",
        )
    text = load_text(config.text)
    training, validation = split(text, config.sequence_length)
    torch.manual_seed(config.seed)
    model = ParaRNNForCausalLM(config.model).to(device)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(
        parameter_groups(model, config.weight_decay), lr=config.learning_rate, betas=(0.9, 0.95), fused=True
    )
    windows = Windows(training, config.batch_size, config.sequence_length, config.seed)
    digest = hashlib.sha256(text).hexdigest()
    run = Run(config, directory, device, model, optimizer, windows, validation, digest, 0, 0.0, [])
    if resume:
        _restore(run, saved)
    else:
        directory.mkdir(parents=True, exist_ok=True)
        for name in (checkpoint.NAME, LOG, CURVE, REPORT):
            (directory / name).unlink(missing_ok=True)
    return run


def _save(run: Run) -> None:
    checkpoint.save(run.checkpoint, _state(run))
    run.saved_step = run.step


def _state(run: Run) -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state(run.device) if run.device.type == "cuda" else None
    return {
        "config": run.config.to_dict(), "step": run.step, "seconds": run.seconds, "losses": run.losses,
        "model": run.model.state_dict(), "optimizer": run.optimizer.state_dict(), "data": run.windows.state_dict(),
        "rng": torch.get_rng_state(), "cuda_rng": cuda, "text_sha256": run.text_sha256,
    }  # fmt: skip


def _restore(run: Run, saved: dict[str, Any]) -> None:
    if saved["config"] != run.config.to_dict():
        changed = [k for k, v in run.config.to_dict().items() if saved["config"].get(k) != v]
        bad_value(
            "config",
            f"other values than the checkpoint's for {', '.join(changed)}",
            "the configuration of the run that is continued",
        )
    if saved["text_sha256"] != run.text_sha256:
        bad_value("text", "a text that changed since the checkpoint was written", "the same text, or a new run")
    run.model.load_state_dict(saved["model"])
    run.optimizer.load_state_dict(saved["optimizer"])
    run.windows.load_state_dict(saved["data"])
    torch.set_rng_state(saved["rng"])
    if saved["cuda_rng"] is not None and run.device.type == "cuda":
        torch.cuda.set_rng_state(saved["cuda_rng"], run.device)
    run.step, run.seconds, run.losses = saved["step"], saved["seconds"], saved["losses"]
    run.saved_step = run.step
    _cut_log(run.directory / LOG, run.step)


def _cut_log(path: Path, step: int) -> None:
    """Drop the lines of steps after `step`, which a killed run wrote after its last checkpoint."""
    lines = path.read_text().splitlines(keepends=True)[:step] if path.exists() else []
    path.write_text("".join(lines))


def _bar(run: Run) -> tqdm:
    """A progress bar, seldom redrawn where it goes to a file."""
    interval = 0.2 if sys.stderr.isatty() else 15.0
    return tqdm(
        total=run.config.steps, initial=run.step, desc="training", unit="step", mininterval=interval, dynamic_ncols=True
    )
