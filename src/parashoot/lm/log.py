"""What a run tells of itself while it trains: a progress bar, a line of JSON for each step, and TensorBoard's files."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

LOG, TENSORBOARD = "log.jsonl", "tensorboard"


class Log:
    """Writes the facts of each step to `directory`, from one of the processes; `speaks` says whether this is the one."""

    def __init__(self, directory: Path, step: int, steps: int, *, tensorboard: bool, speaks: bool):
        self.speaks = speaks
        if not speaks:
            return
        self.file = (directory / LOG).open("a")
        self.board = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(str(directory / TENSORBOARD), purge_step=step + 1)
        interval = 0.2 if sys.stderr.isatty() else 15.0
        self.bar = tqdm(
            total=steps, initial=step, desc="training", unit="step", mininterval=interval, dynamic_ncols=True
        )

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        if self.speaks:
            self.file.close()
            self.bar.close()
            if self.board is not None:
                self.board.close()

    def write(self, facts: dict[str, Any]) -> None:
        """Log the facts of the step that `facts["step"]` names."""
        if not self.speaks:
            return
        self.file.write(json.dumps(facts) + "\n")
        self.file.flush()
        self.bar.set_postfix_str(
            f"loss {facts['loss']:.3f}, {facts['bits_per_byte']:.3f} bits/byte, {facts['tokens_per_s']:,.0f} tokens/s",
            False,
        )
        self.bar.update()
        if self.board is not None:
            layers = [
                {f"layer {k}/{n}": v for n, v in layer.items()} for k, layer in enumerate(facts.get("solver", []))
            ]
            scalars = {k: v for k, v in facts.items() if k not in ("step", "solver")}
            for name, value in {**scalars, **{k: v for layer in layers for k, v in layer.items()}}.items():
                self.board.add_scalar(name, value, facts["step"])


def read_log(directory: Path, last: int | None = None) -> list[dict[str, Any]]:
    """The facts of the steps logged so far, none after step `last`; a line that was cut off is left out."""
    path, found = directory / LOG, []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            facts = json.loads(line)
        except ValueError:
            break
        if last is None or facts["step"] <= last:
            found.append(facts)
    return found


def cut_log(directory: Path, last: int) -> None:
    """Drop the lines after step `last`, which a killed run wrote after its last checkpoint."""
    beside = directory / (LOG + ".new")
    beside.write_text("".join(json.dumps(facts) + "\n" for facts in read_log(directory, last)))
    os.replace(beside, directory / LOG)
