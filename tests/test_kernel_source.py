"""The text of generated kernels, and what the compiler makes of it for Hopper: both without a GPU.

`python tests/test_kernel_source.py` writes the golden files anew; read their diff.
"""

import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import parashoot as ps
from parashoot.plan import instructions_of
from parashoot.tiling import choose, choose_heads
from parashoot.trace import trace_of

HERE = Path(__file__).parent
GOLDEN = HERE / "golden"
DIRECTIONS = {"channelwise": ("forward", "backward", "decode"), "headwise": ("forward", "backward"), "dense": ()}
SOURCES = [(name, d) for name in ps.cells.__all__ for d in DIRECTIONS[getattr(ps.cells, name).structure]]
every_source = pytest.mark.parametrize(("name", "direction"), SOURCES)


def source(name: str, direction: str) -> str:
    return getattr(ps.cells, name).triton_source(direction)


@every_source
def test_the_source_is_the_golden_one(name, direction):
    assert source(name, direction) == (GOLDEN / f"{name}_{direction}.txt").read_text()


@every_source
def test_the_source_is_python_and_complete(name, direction):
    text = source(name, direction)
    compile(text, name, "exec")
    assert not re.search(r"\{\w*\}|\$", text)


def test_options_change_the_source():
    plain = ps.cells.lstm.triton_source("backward")
    assert "reset_ptr" in ps.cells.lstm.triton_source("backward", reset=True) and "reset_ptr" not in plain
    assert "g0_1" in ps.cells.lstm.triton_source("backward", return_states=True) and "g0_1" not in plain


def test_a_cell_without_kernels_says_why():
    with pytest.raises(ps.BackendError, match="dense"):
        ps.cells.elman.triton_source()
    with pytest.raises(ps.BackendError, match="headwise"):
        ps.cells.headgru.triton_source("decode")
    with pytest.raises(ps.ArgumentError, match="sideways"):
        ps.cells.gru.triton_source("sideways")


def test_no_kernel_text_names_a_cell():
    words = "|".join(ps.cells.__all__)
    for path in (HERE.parent / "src/parashoot/triton").glob("*.py"):
        assert not re.search(rf"\b({words})\b", path.read_text(), re.IGNORECASE), path


# Registers a thread with the tiling that an H100 gets at 8 x 2048 x 2048. A multiprocessor has 65,536: 64 threads a program and
# 128 registers leave room for 8 programs. Backward there are 4 of one or two states; of four states 8 of one warp: they may take more.
REGISTERS = {
    ("gru", "forward"): 96, ("gru", "backward"): 160, ("lstm", "forward"): 120, ("lstm", "backward"): 176,
    ("slstm", "forward"): 255, ("slstm", "backward"): 255,
    ("headgru", "forward"): 144, ("headgru", "backward"): 255, ("headlstm", "forward"): 224, ("headlstm", "backward"): 255,
    ("headrotor", "forward"): 255, ("headrotor", "backward"): 255,
}  # fmt: skip
SHARED = 232_448  # bytes a program may have on Hopper
SPILLED = {"shoot": 0, "correct": 2048}  # bytes; corrections are rare
HELD = {  # four states of four channels; matrices, transposes and gradients of matrices
    ("slstm", "backward"): 16,
    ("headgru", "backward"): 64, ("headlstm", "backward"): 1280, ("headrotor", "backward"): 896,
}  # fmt: skip


def jobs() -> list[tuple]:
    out = []
    for (name, direction), launch, dtype in (
        (key, launch, dtype) for key in REGISTERS for launch in SPILLED for dtype in ("bf16", "fp32")
    ):
        if (launch, dtype) != ("correct", "fp32"):
            cell, size = getattr(ps.cells, name), 2 if dtype == "bf16" else 4
            found = trace_of(cell, torch.float32, torch.device("cpu"))
            if cell.width:
                tiling, _ = choose_heads(8, 2048, 2048, size, len(cell.states), cell.width, 132, None, found.turns)
            else:
                facts = (size, len(cell.states), instructions_of(cell, found), 132, None, direction == "backward")
                tiling, _ = choose(8, 2048, 2048, *facts)
            out.append((name, direction, launch, dtype, dataclasses.asdict(tiling)))
    tiling, _ = choose(8, 2048, 2048, 2, 1, (30, 60), 132, None)
    sines = itertools.product(
        ["waves"], ["forward", "backward"], ["shoot"], ["bf16", "fp32"], [dataclasses.asdict(tiling)]
    )
    return [*out, *sines]


def test_kernels_compile_for_hopper_within_their_budgets():
    pytest.importorskip("triton")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(HERE.parent / "src")
    command = [sys.executable, str(HERE / "ahead_of_time.py"), json.dumps(jobs())]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(rows) == len(jobs())
    over = [
        row
        for row in rows
        if row["shared"] > SHARED
        or row["spilled"] > max(SPILLED[row["launch"]], HELD.get((row["cell"], row["direction"]), 0))
        or (row["launch"] == "shoot" and row["registers"] > REGISTERS.get((row["cell"], row["direction"]), 128))
    ]
    assert over == []
    # sine and cosine of huge arguments, as libraries have them, take a table on the stack and branches that keep elements apart
    assert [row["stack"] for row in rows if row["cell"] == "waves"] == [0] * 4


if __name__ == "__main__":
    GOLDEN.mkdir(exist_ok=True)
    for name, direction in SOURCES:
        (GOLDEN / f"{name}_{direction}.txt").write_text(source(name, direction))
