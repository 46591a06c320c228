"""Checkpoints: written whole or not at all, read without running code."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch

from ..errors import bad_value
from .model import ParaRNNForCausalLM
from .train_config import TrainConfig

NAME = "checkpoint.pt"
FORMAT = 2


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` beside `path`, then move it there in one step: an interruption leaves the old file or the new one."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "wb") as file:
        torch.save({**state, "format": FORMAT}, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def load(path: str | Path) -> dict[str, Any]:
    """What `save` wrote, on the CPU. Raises `ArgumentError` for a missing, damaged or foreign file."""
    if not Path(path).is_file():
        bad_value("checkpoint", f"'{path}'", "an existing file", "Training writes one to runs/NAME/checkpoint.pt.")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a damaged file fails anywhere in the reader
        reason = str(e).strip().splitlines() or [type(e).__name__]
        bad_value("checkpoint", f"'{path}', which cannot be read ({reason[0][:100]})", "a checkpoint of parashoot")
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        bad_value("checkpoint", f"'{path}', written by something else", f"a checkpoint of parashoot, format {FORMAT}")
    return state


def load_model(path: str | Path, device: str | torch.device = "cpu") -> ParaRNNForCausalLM:
    """The model of the checkpoint at `path`, or of the directory that `save_pretrained` wrote, ready to generate."""
    if Path(path).is_dir():
        return ParaRNNForCausalLM.from_pretrained(path).to(device).eval()  # type: ignore[arg-type]
    state = load(path)
    model = ParaRNNForCausalLM(TrainConfig.from_dict(state["config"]).model)
    model.load_state_dict(state["model"])
    return model.to(device).eval()  # type: ignore[arg-type]
