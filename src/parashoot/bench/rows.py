"""The results file (one JSON object a line, only ever appended to), what each row says of its surroundings, and rows as text."""

from __future__ import annotations

import datetime
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..errors import bad_value
from .case import Case

Row = dict[str, Any]
CASE = ("cell", "batch", "time", "channels", "dtype", "mode", "sigma")


def surroundings(device: torch.device, bandwidth: float, commit: str | None) -> Row:
    """Commit, card, versions and copy bandwidth, the same for all rows of a run."""
    import parashoot

    gpu = device.type == "cuda"
    versions = {"parashoot": parashoot.__version__, "torch": torch.__version__, "python": platform.python_version()}
    try:
        import triton

        versions["triton"] = triton.__version__
    except ImportError:
        pass
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"{platform.machine()} CPU, {torch.get_num_threads()} threads",
        "copy_gb_s": bandwidth / 1e9, "commit": commit or _commit(), "versions": versions,
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
    }  # fmt: skip


def _commit() -> str:
    """The commit of the source tree, with '+' where it has changes; 'unknown' outside a git checkout."""

    root = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        git(
            "ls-files", "--error-unmatch", str(root / "__init__.py")
        )  # an installed copy may lie inside another repository
        return git("rev-parse", "--short", "HEAD") + (
            "+" if git("status", "--porcelain", "--untracked-files=no") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def append(path: Path, rows: Iterable[Row]) -> None:
    """Add rows to the end of the results file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


def read(path: Path, argument: str) -> list[Row]:
    """All rows of a results file. Raises `ArgumentError` naming `argument`."""
    if not path.is_file():
        bad_value(argument, f"'{path}'", "an existing results file", "Write one with: parashoot bench --out FILE")
    rows = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as e:
            bad_value(argument, f"'{path}', line {number}: {e}", "one JSON object a line")
    return rows


def label(row: Row) -> str:
    """The case of a row, in words."""
    return str(Case(**{name: row[name] for name in CASE}))


def duration(us: float) -> str:
    """Microseconds in three figures."""
    for unit, scale in (("us", 1.0), ("ms", 1e3), ("s", 1e6)):
        if abs(us) < 999.5 * scale or unit == "s":
            return f"{us / scale:.3g} {unit}"
    raise AssertionError


def cells(row: Row) -> list[str]:
    """fwd, x floor, bwd, x floor, memory, error: the figures of a row as text; of a skipped one, its reason."""
    if row["status"] == "skipped":
        return [f"skipped: {row['reason']}"]
    found = []
    for at, name in enumerate(("forward_us", "backward_us")):
        if name not in row:
            found += ["", ""]
            continue
        median = row[name][1]
        over = median / row["floor_us"][at]
        found += [duration(median), f"{over:.2f}x" if over < 100 else f"{over:.0f}x"]
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
    return [*found, memory, f"{row['error']:.1e}" + (" wrong" if row["status"] == "wrong" else "")]


HEAD = ("case", "contestant", "fwd", "x floor", "bwd", "x floor", "memory", "error")


def table(rows: Sequence[Row]) -> str:
    """Rows in aligned columns."""
    lines = [list(HEAD), *([label(row), row["contestant"], *cells(row)] for row in rows)]
    widths = [max(len(line[k]) for line in lines if len(line) == len(HEAD) or k < 2) for k in range(len(HEAD))]

    def aligned(line: list[str]) -> str:
        left = [f"{text:{width}}" for text, width in zip(line[:2], widths[:2], strict=True)]
        right = [f"{text:>{width}}" for text, width in zip(line[2:], widths[2:], strict=len(line) > 3)]
        return "  ".join([*left, *(right if len(line) > 3 else line[2:])])

    return "\n".join(aligned(line).rstrip() for line in lines)
