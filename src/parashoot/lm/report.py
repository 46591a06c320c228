"""What a finished run prints: validation, and for the demo a sample and the measured speed, and where everything is."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict
from typing import Any

import torch

from ..scan import explain
from .checkpoint import load_model
from .evaluate import Evaluation, evaluate
from .generate import generate_text
from .log import LOG, read_log
from .plot import loss_curve
from .processes import precision
from .speed import layer_speed
from .train import CURVE, REPORT, Run

SPEED_LENGTH = 4096


def introduce(run: Run) -> str:
    """What is about to be trained, in two lines."""
    c, group = run.config, run.group
    count = sum(p.numel() for p in run.model.parameters())
    kind = "cell" if run.model.recurrent_layers() else "mixer"
    facts = {k: getattr(c.model, k) for k in ("hidden_size", "num_hidden_layers", kind)}
    threads = f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else ""
    where = f"{group.size} x {run.device.type}" if group.size > 1 else f"{run.device}"
    return (
        f"{count:,} parameters ({', '.join(f'{k} {v}' for k, v in facts.items())}); on {where}{threads}, "
        f"{'bf16' if run.bf16 else 'fp32'}.\n"
        f"{c.steps} steps of {c.batch_size} x {c.sequence_length} tokens from {c.data or 'the shipped corpus'}{_plan(run)}."
    )


def _plan(run: Run) -> str:
    """How the recurrence runs over time at the shape of a training step."""
    layers = run.model.recurrent_layers()
    if not layers:
        return ""
    micro, layer = run.config.micro_batch(run.group.size), layers[0]
    shape = (micro, run.config.sequence_length, len(layer.cell.inputs), layer.hidden_size)
    plan = explain(layer.cell, torch.empty(shape, device=run.device)).plan
    if plan.chunks == 1:
        return "; time runs step by step (the batch fills this machine)"
    return f"; time runs in {plan.chunks} parallel chunks of {plan.chunk_length} steps"


def report(run: Run, prompt: str, sample_bytes: int = 400) -> None:
    """Evaluate the run and print the results; also written to report.json in its directory. Every process calls it."""
    found = _validation(run)
    if run.group.rank:
        return
    facts: dict[str, Any] = {
        "steps": run.step, "minutes": run.seconds / 60, "tokens_per_s": run.tokens_per_second,
        "threads": torch.get_num_threads(), "torch": torch.__version__,
    }  # fmt: skip
    print(f"\nTrained {run.step} steps in {run.seconds / 60:.1f} minutes, {run.tokens_per_second:,.0f} tokens/s.")
    if found is not None:
        facts |= {"validation_bits_per_byte": found.bits_per_byte, "validation_perplexity": found.perplexity}
        print(
            f"Validation: {found.bits_per_byte:.3f} bits per byte, perplexity {found.perplexity:.2f}, "
            f"over {found.scored:,} tokens that were not trained on."
        )
    if run.config.data is None and run.group.size == 1:
        facts |= _demonstrate(run, prompt, sample_bytes)
    (run.directory / REPORT).write_text(json.dumps(facts, indent=2) + "\n")
    losses = [line["bits_per_byte"] for line in read_log(run.directory)]
    drawn = loss_curve(losses, found and found.bits_per_byte, run.directory / CURVE)
    print(f"Loss curve: {run.directory / CURVE}" if drawn else "Loss curve: not drawn, matplotlib is not installed.")
    print(f"Log: {run.directory / LOG}\nCheckpoint: {run.saved}")
    again = ["parashoot", "generate", "--checkpoint", str(run.directory), "--prompt", prompt]
    print(f"Go on from it: {shlex.join(again)}")


def _validation(run: Run) -> Evaluation | None:
    tokens = run.data.splits.get("validation")
    if tokens is None or len(tokens) < 2:
        return None
    window = max(1, run.config.sequence_length // 2)  # with as much context it is what attention was trained on
    return evaluate(run.model, tokens, batch=32, window=window, lower=precision(run.group, run.bf16))


def _demonstrate(run: Run, prompt: str, sample_bytes: int) -> dict[str, Any]:
    """A sample of the byte-level model, and the speed of its first layer."""
    sample = generate_text(run.model, prompt, sample_bytes, temperature=0.8, top_k=40, seed=run.config.seed)
    print(f"\nSample:\n{prompt}{sample}\n")
    if not run.model.recurrent_layers():
        return {"sample": prompt + sample}
    tokens = torch.from_numpy(run.data.split("validation").read(0, SPEED_LENGTH))
    assert run.saved is not None
    speed = layer_speed(load_model(run.saved), tokens)
    print(f"Speed: {speed}\n")
    return {"sample": prompt + sample, "speed_ms": asdict(speed)}
