"""Checkpoints: directories `step-000123`, written whole or not at all, that any number of processes can read.

In each, PyTorch's distributed checkpoint holds weights, optimizer and random states, `checkpoint.json` the rest, and there is a copy of the
run's tokenizer, if it has one. `latest`, beside them, names the last one.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import (
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)
from transformers import AutoModelForCausalLM

from ..errors import CheckpointError, bad_value
from .data import TOKENIZER
from .models import build_model, materialized, model_config
from .processes import Processes

FACTS, LATEST = "checkpoint.json", "latest"
FORMAT = 2


def steps(run: Path) -> list[Path]:
    """The checkpoints of a run's directory, oldest first."""
    return sorted((p for p in run.glob("step-*") if p.name[5:].isdigit()), key=lambda p: int(p.name[5:]))


def find(path: str | Path) -> Path:
    """The checkpoint at `path`, or the latest one of the run there. Raises `ArgumentError` if there is none."""
    path = Path(path)
    if (path / FACTS).is_file():
        return path
    if not (path / LATEST).is_file():
        bad_value(
            "checkpoint", f"'{path}'", "the directory of a run or of a checkpoint", "parashoot train writes runs/NAME."
        )
    found = path / (path / LATEST).read_text().strip()
    if not (found / FACTS).is_file():
        others = ", ".join(p.name for p in steps(path)) or "none"
        bad_value(
            "checkpoint", f"'{found}', which '{path / LATEST}' names and is missing", f"one of those there: {others}"
        )
    return found


def facts(path: Path) -> dict[str, Any]:
    """What `save` was given beside tensors. Raises `ArgumentError` for a damaged or foreign file."""
    try:
        found = json.loads((path / FACTS).read_text())
    except ValueError as e:
        bad_value("checkpoint", f"'{path / FACTS}', which is not JSON ({e})", "a checkpoint of parashoot")
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        bad_value("checkpoint", f"'{path}', written by something else", f"a checkpoint of parashoot, format {FORMAT}")
    return found


def save(
    run: Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    rest: dict[str, Any],
    keep: int,
    group: Processes,
) -> Path:
    """Write the checkpoint of `step` into the run's directory, and let go of all but the last `keep`.

    Raises `CheckpointError` if it cannot be written; those before it stay.
    """
    path = run / f"step-{step:06d}"
    beside = path.with_name(path.name + ".partial")
    if group.rank == 0:
        for left in run.glob("step-*.partial"):  # by runs killed while saving
            shutil.rmtree(left, ignore_errors=True)
    group.barrier()
    weights, moments = get_state_dict(model, optimizer)
    state = {"model": weights, "optimizer": moments, "random": {str(group.rank): _random(group)}}
    problem = None
    try:
        with _alone():
            dcp.save(state, checkpoint_id=beside, no_dist=group.size == 1)
        if group.rank == 0:
            if (run / TOKENIZER).is_file():  # a checkpoint that is taken elsewhere still knows its text
                shutil.copyfile(run / TOKENIZER, beside / TOKENIZER)
            _write(beside / FACTS, json.dumps({"format": FORMAT, "step": step, **rest}, indent=1) + "\n")
            shutil.rmtree(path, ignore_errors=True)  # of this very step, by a run killed before `latest` named it
            os.replace(beside, path)
            _write(run / LATEST, path.name + "\n")
            before = [p for p in steps(run) if int(p.name[5:]) <= step]  # a run that went back has later ones, too
            for old in before[:-keep]:
                shutil.rmtree(old)
    except (OSError, CheckpointException) as e:
        problem = _reason(e)
        shutil.rmtree(beside, ignore_errors=True)
    if problems := [p for p in group.gather(problem) if p]:
        kept = f"that of {steps(run)[-1].name} is kept" if steps(run) else "there was none before it"
        raise CheckpointError(
            f"the checkpoint of step {step} in {run} could not be written ({problems[0]}); {kept}. "
            f"Make room and continue with --resume {shlex.quote(str(run))}."
        )
    return path


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer, group: Processes) -> None:
    """Set model, optimizer and this process's random state to those of a checkpoint. Raises `ArgumentError` if it is damaged."""
    weights, moments = get_state_dict(model, optimizer)
    state: dict[str, Any] = {"model": weights, "optimizer": moments}
    rank, random = str(group.rank), _random(group)
    saved_by = _read_names(path)
    known = all(f"random.{rank}.{kind}" in saved_by for kind in random)
    _read({**state, "random": {rank: random}} if known else state, path, group)
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=moments)
    if not known:  # more processes than wrote it
        torch.manual_seed(torch.initial_seed() + group.rank)
        return
    torch.set_rng_state(random["cpu"])
    if "cuda" in random:
        torch.cuda.set_rng_state(random["cuda"], group.device)


def load_model(path: str | Path, device: str | torch.device = "cpu") -> Any:
    """The model of a checkpoint, of the latest one of a run, or of a directory that `save_pretrained` wrote, ready to generate.

    Raises `ArgumentError` for a missing, damaged or foreign one.
    """
    if (Path(path) / "config.json").is_file():
        return AutoModelForCausalLM.from_pretrained(path).to(device).eval()  # type: ignore[arg-type]
    path = find(path)
    model = build_model(model_config(facts(path)["config"]["model"]))
    list(materialized(model, torch.device(device), None))
    weights = get_model_state_dict(model)
    _read({"model": weights}, path, Processes(0, 1, torch.device("cpu")))
    set_model_state_dict(model, weights)
    return model.eval()


def _random(group: Processes) -> dict[str, Tensor]:
    found = {"cpu": torch.get_rng_state()}
    return {**found, "cuda": torch.cuda.get_rng_state(group.device)} if group.device.type == "cuda" else found


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    """Without PyTorch's warning that a single process saves and loads alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)
        yield


def _read_names(path: Path) -> set[str]:
    try:
        return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)
    except Exception as e:  # a damaged file fails anywhere in the reader
        _damaged(path, e)


def _read(state: dict[str, Any], path: Path, group: Processes) -> None:
    """Fill the tensors of `state` from the checkpoint at `path`."""
    try:
        with _alone():
            dcp.load(state, checkpoint_id=path, no_dist=group.size == 1)
    except (Exception, CheckpointException) as e:
        _damaged(path, e)


def _damaged(path: Path, e: BaseException) -> NoReturn:
    others = ", ".join(p.name for p in steps(path.parent) if p != path)
    remedy = (
        f"Others are there: {others}; write a name into '{path.parent / LATEST}' to go on from it." if others else ""
    )
    bad_value("checkpoint", f"'{path}', which cannot be read ({_reason(e)})", "a whole checkpoint", remedy)


def _reason(e: BaseException) -> str:
    if isinstance(e, CheckpointException) and e.failures:
        e = next(iter(e.failures.values()))[0]
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:160]


def _write(path: Path, text: str) -> None:
    """Replace the file at `path` in one step."""
    beside = path.with_name(path.name + ".new")
    with open(beside, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
