"""The results file (one JSON object a line, only appended to), and what is made of it: Markdown tables and plots."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from ..errors import bad_value
from .cases import SUITES
from .rows import Row, read_rows
from .trial import CHANNELS, SEQUENCES, STEPS

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
OURS = "scan-triton"
HEAD = ("case", "contestant", "fwd", "x floor", "bwd", "x floor", "memory", "error", f"time / {OURS}")
LEGEND = (
    "fwd, bwd: medians, on a GPU replayed from a CUDA graph, so that the host's launches do not count; *: they do, for "
    "this one cannot be captured. x floor: over the floor, inputs and outputs once (backward: those and their gradients) "
    "at the bandwidth of a large copy in the same run; a backward pass that needs not all of them may be below. memory: "
    f"the peak beside inputs. error: the largest distance from the fp64 for-loop over the contestant's own recurrence, in {SEQUENCES} "
    f"sequences, {STEPS:,} steps and {CHANNELS} channels, wrong where y or a gradient is "
    f"farther off than the numerics contract allows. time / {OURS}: all passes measured, where both are right; ~: in "
    "two runs."
)
AXES = {
    "time": ("steps T", lambda row: row["time"]),
    "width": ("sequences x channels", lambda row: row["batch"] * row["channels"]),
}


def facts(device: torch.device, commit: str | None = None) -> Row:
    """Commit, card and versions, the same for all rows of a run."""
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else cpu
    versions = {"torch": torch.__version__, "python": platform.python_version(), "triton": version("triton")}
    return {"device": card, "commit": commit or _commit(), "versions": versions}


def version(package: str) -> str:
    """The version of an installed package; "" where it is not."""
    return next((found.version for found in metadata.distributions(name=package)), "")


def _commit() -> str:
    """The commit of the source tree, with '+' where it has changes; 'unknown' outside a git checkout."""
    root = Path(__file__).parents[3]
    command = ["git", "-C", str(root), "describe", "--always", "--dirty=+", "--exclude=*"]
    if not (root / ".git").exists():  # an installed copy may lie inside another repository
        return "unknown"
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def read(path: Path, argument: str = "--render") -> list[Row]:
    """The last row for each suite, device, case and contestant, in order of first appearance; a last line that was cut off is left out."""
    newest: dict[tuple, Row] = {}

    def add(row: Row) -> None:
        _ = SUITES[row["suite"]]
        newest[row["suite"], row["device"], row["case"], row["contestant"]] = row

    read_rows(path, argument, "parashoot bench", "suite", add)
    return list(newest.values())


def render(path: Path, readme: Path) -> int:
    """Replace the marked block of `readme` by tables, or plots, of each suite's newest rows in the results file; plots go beside it."""
    rows, text = read(path), readme.read_text("utf-8") if readme.is_file() else ""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        bad_value("--readme", f"'{readme}'", f"a file with the lines {START} and {END} where the tables shall stand")
    plots, parts = 0, [tables([r for r in rows if r["suite"] not in AXES]), LEGEND]
    for (name,), of_suite in groups(rows, "suite").items():
        image = path.with_name(f"{path.stem}-{name}.png")  # several files may lie in one directory
        if name in AXES and plot(of_suite, name, image):
            plots += 1
            parts.append(_heading(name, of_suite))
            parts.append(f"![{SUITES[name].about}]({Path(os.path.relpath(image, readme.parent)).as_posix()})")
    readme.write_text(before + start + "\n" + "\n\n".join(parts) + "\n" + end + after, "utf-8")
    print(f"{readme}: {len(rows)} rows of {path}, {plots} plots")
    return 0


def tables(rows: Sequence[Row]) -> str:
    """For each suite and device a table, under what it ran on, and the names of those that did not run."""
    parts = []
    for (name, _), there in groups(rows, "suite", "device").items():
        ran, skipped = ([r for r in there if (r["status"] == "skipped") == bad] for bad in (False, True))
        parts += [_heading(name, there), _table(ran)]
        if skipped:
            reasons = (f"{contestant}: {reason}" for contestant, reason in groups(skipped, "contestant", "reason"))
            parts.append(f"Not run: {'; '.join(reasons).rstrip('.')}.")
    return "\n\n".join(parts)


def _heading(name: str, rows: Sequence[Row]) -> str:
    """What a suite shows, and what its rows ran on."""
    named = lambda values: dict.fromkeys(v for v in values if v)
    commit = f"commit {' and '.join(named(r['commit'] for r in rows))}"
    versions = [f"{k} {v}" for k, v in rows[-1]["versions"].items() if v]
    packages = named(r["package"] for r in rows if r["status"] != "skipped")
    ground = [*named(r["device"] for r in rows), commit, *versions, *packages]
    return f"**{name}**: {SUITES[name].about}. {', '.join(ground)}, copies at {rows[-1]['copy_gb_s']:.0f} GB/s."


def _table(rows: Sequence[Row]) -> str:
    total = lambda row: sum(row[k][1] for k in ("forward_us", "backward_us") if k in row)
    ours = {r["case"]: r for r in rows if r["contestant"] == OURS and r["status"] == "ok"}
    run = lambda row: (row["commit"], row["copy_gb_s"])  # bandwidth is measured once in each
    lines: list[list[str]] = [list(HEAD)]
    for r in rows:
        compared = r["contestant"] != OURS and r["status"] == "ok" and r["case"] in ours
        ratio = ""
        if compared:
            own = ours[r["case"]]
            ratio = f"{'' if run(r) == run(own) else '~'}{total(r) / total(own):.2f}x"
        name = r["contestant"] + (" *" if r.get("timed_by", "").startswith("events") else "")
        lines.append([r["case"], name, *figures(r), ratio])
    return markdown(lines)


def markdown(lines: list[list[str]]) -> str:
    """A table of Markdown, its head in the first line: two columns of words, the rest figures."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * w if k < 2 else "-" * (w - 1) + ":" for k, w in enumerate(widths)]
    aligned = lambda k, text: f"{text:{'<' if k < 2 else '>'}{widths[k]}}"
    return "\n".join(
        f"| {' | '.join(aligned(k, text) for k, text in enumerate(line))} |" for line in (lines[0], rule, *lines[1:])
    )


def figures(row: Row) -> list[str]:
    """fwd, x floor, bwd, x floor, memory and error of a row as text."""
    found = []
    for name, floor in zip(("forward_us", "backward_us"), row["floor_us"], strict=False):
        us = row[name][1]
        unit, scale = ("us", 1.0) if us < 999.5 else ("ms", 1e3) if us < 999.5e3 else ("s", 1e6)
        found += [f"{us / scale:.3g} {unit}", f"{us / floor:.2f}x" if us < 100 * floor else f"{us / floor:.0f}x"]
    found += [""] * (4 - len(found))
    memory = "" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 2**20:.0f} MiB"
    return [*found, memory, f"{row['error']:.1e}{' wrong' if row['status'] == 'wrong' else ''}"]


def plot(rows: Sequence[Row], axis: str, path: Path) -> bool:
    """Draw the times of right results, a line a contestant, and the floor (dashed). False without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    name, at = AXES[axis]
    figure = Figure(figsize=(10.0, 4.2), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    right = sorted((r for r in rows if r["status"] == "ok"), key=at)
    for index, (axes, direction) in enumerate(zip(panels, ("forward", "backward"), strict=True)):
        shown = [r for r in right if f"{direction}_us" in r]
        for (contestant,), line in groups(shown, "contestant").items():
            x, (low, middle, high) = [at(r) for r in line], zip(*(r[f"{direction}_us"] for r in line), strict=True)
            axes.plot(x, middle, "o-", markersize=3, label=contestant)
            axes.fill_between(x, low, high, alpha=0.2)
        floor = {at(r): r["floor_us"][index] for r in shown if r["contestant"].startswith("scan")}
        axes.plot(list(floor), list(floor.values()), "--", color="black", label="floor")
        axes.set(xscale="log", yscale="log", xlabel=name, ylabel="microseconds", title=direction)
    panels[0].legend(fontsize=8)
    figure.savefig(path, dpi=120)
    return True


def groups(rows: Sequence[Row], *keys: str) -> dict[tuple[Any, ...], list[Row]]:
    """Rows by their values of some keys, in order of first appearance."""
    found: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(tuple(row[key] for key in keys), []).append(row)
    return found
