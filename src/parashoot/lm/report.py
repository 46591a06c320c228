"""What a finished run prints: validation, a sample, the measured speed, and where everything is."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict

import torch

from ..plan import Explanation
from ..scan import explain
from .evaluate import bits_per_byte
from .generate import generate_text
from .model import ParaRNNForCausalLM
from .plot import loss_curve
from .speed import layer_speed
from .train import CURVE, LOG, REPORT, Run

SPEED_LENGTH = 4096


def training_plan(run: Run) -> Explanation:
    """How the recurrence runs over time at the shape of a training step."""
    layer = run.model.recurrent_layers()[0]
    shape = (run.config.batch_size, run.config.sequence_length, len(layer.cell.inputs), layer.hidden_size)
    return explain(layer.cell, torch.empty(shape, device=run.device))


def introduce(run: Run) -> str:
    """What is about to be trained, in two lines."""
    c, m = run.config, run.config.model
    plan = training_plan(run).plan
    how = (
        "step by step (the batch fills this machine)"
        if plan.chunks == 1
        else f"in {plan.chunks} parallel chunks of {plan.chunk_length} steps"
    )
    where = f"{run.device}" + (f", {torch.get_num_threads()} threads" if run.device.type == "cpu" else "")
    return (
        f"{run.model.num_parameters():,} parameters: {m.num_hidden_layers} blocks of width {m.hidden_size}, cell {m.cell}; on {where}.\n"
        f"{c.steps} steps of {c.batch_size} x {c.sequence_length} bytes from {c.text or 'the shipped corpus'}; time runs {how}."
    )


def report(run: Run, prompt: str, sample_bytes: int = 400) -> None:
    """Evaluate the run and print the results; also written to report.json in its directory."""
    validation = bits_per_byte(run.model, run.validation)
    print(f"\nTrained {run.step} steps in {run.seconds / 60:.1f} minutes, {run.tokens_per_second:,.0f} bytes/s.")
    print(
        f"Validation: {validation:.3f} bits per byte over {run.validation.shape[0]:,} bytes that were not trained on."
    )
    sample = generate_text(run.model, prompt, sample_bytes, temperature=0.8, top_k=40, seed=run.config.seed)
    print(f"\nSample:\n{prompt}{sample}\n")
    on_cpu: ParaRNNForCausalLM = copy.deepcopy(run.model).cpu()
    tokens = run.validation.repeat(-(-SPEED_LENGTH // run.validation.shape[0]))[:SPEED_LENGTH].long()
    speed = layer_speed(on_cpu, tokens)
    print(f"Speed: {speed}\n")
    facts = {
        "steps": run.step, "minutes": run.seconds / 60, "bytes_per_s": run.tokens_per_second,
        "validation_bits_per_byte": validation, "speed_ms": asdict(speed), "threads": torch.get_num_threads(),
        "torch": torch.__version__, "sample": prompt + sample,
    }  # fmt: skip
    (run.directory / REPORT).write_text(json.dumps(facts, indent=2) + "\n")
    drawn = loss_curve(run.losses, validation, run.directory / CURVE)
    print(f"Loss curve: {run.directory / CURVE}" if drawn else "Loss curve: not drawn, matplotlib is not installed.")
    print(f"Log: {run.directory / LOG}\nCheckpoint: {run.checkpoint}")
    print(f'Go on from it: parashoot generate --checkpoint {run.checkpoint} --prompt "{prompt}"')
