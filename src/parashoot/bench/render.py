"""A block of a Markdown file, and plots, made anew from a results file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import bad_value
from .plot import plot
from .rows import CASE, HEAD, Row, cells, label, read
from .suites import SUITES

START, END = "<!-- bench:start -->", "<!-- bench:end -->"
OURS = "scan-triton"
LEGEND = (
    "fwd and bwd are medians; x floor is the time over the floor, the bytes that must move once (inputs, outputs, final state; "
    "backward: inputs, outputs and their gradients) over the bandwidth of a large copy in the same run. memory is the peak beside "
    "inputs. error is the largest distance from the fp64 for-loop over the contestant's own recurrence. "
    f"time / {OURS} compares all passes measured; there is none where a result is wrong: farther from the loop than the numerics "
    "contract allows (fp32: 1e-5 or twice the fp32 loop's own error; bf16: 2^-8 |y| + 5e-4; gradients likewise)."
)


def render(results: Path, readme: Path) -> int:
    """Replace the marked block of `readme` by tables of the newest rows in `results`; plots go beside the results file."""
    rows, text = newest(read(results, "--render")), readme.read_text() if readme.is_file() else ""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        bad_value(
            "--readme",
            f"'{readme}'",
            f"a file with the lines {START} and {END}",
            "Add them where the tables shall stand.",
        )
    body, images = block(rows), []
    for name, of_suite in _by("suite", rows).items():
        path = results.parent / f"{name}.png"
        if name in SUITES and SUITES[name].axis and plot(of_suite, SUITES[name].axis, path):
            images.append(f"![{SUITES[name].about}]({Path(os.path.relpath(path, readme.parent)).as_posix()})")
    readme.write_text(before + start + "\n" + "\n\n".join([body, *images]) + "\n" + end + after)
    print(f"{readme}: {len(rows)} rows of {results}" + (f", {len(images)} plots" if images else ""))
    return 0


def newest(rows: Sequence[Row]) -> list[Row]:
    """The last row for each suite, device, case and contestant, in order of first appearance."""
    return list({(r["suite"], r["device"], *(r[k] for k in CASE), r["contestant"]): r for r in rows}.values())


def block(rows: Sequence[Row]) -> str:
    """The tables, one a suite and device, each under what it ran on."""
    parts = []
    for name, of_suite in _by("suite", rows).items():
        for device, there in _by("device", of_suite).items():
            about = SUITES[name].about if name in SUITES else name
            parts.append(f"**{name}**: {about}. {device}, {_versions(there)}.\n\n{_table(there)}{_skipped(there)}")
    return "\n\n".join([*parts, LEGEND])


def ratio(row: Row, ours: Row | None) -> float | None:
    """Time over that of `OURS` in the same case, all passes together; None unless both results are right."""
    if ours is None or row is ours or {row["status"], ours["status"]} != {"ok"}:
        return None
    total = lambda r: sum(r[k][1] for k in ("forward_us", "backward_us") if k in r)
    return total(row) / total(ours)


def _table(rows: Sequence[Row]) -> str:
    lines = [[*HEAD, f"time / {OURS}"], ["---", "---", *["---:"] * (len(HEAD) - 1)]]
    shown, named = [r for r in rows if r["status"] != "skipped"], ""
    best = {label(r): r for r in shown if r["contestant"] == OURS}
    for row in shown:
        times = ratio(row, best.get(label(row)))
        case = "" if label(row) == named else label(row)
        named = label(row)
        lines.append([case, row["contestant"], *cells(row), "" if times is None else f"{times:.2f}x"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _skipped(rows: Sequence[Row]) -> str:
    found: dict[tuple[str, str], list[str]] = {}
    for row in (r for r in rows if r["status"] == "skipped"):
        found.setdefault((row["contestant"], row["reason"]), []).append(label(row))
    more = lambda cases: f" and {len(cases) - 1} more" if len(cases) > 1 else ""
    told = [f"{name} ({cases[0]}{more(cases)}): {reason.rstrip('.')}" for (name, reason), cases in found.items()]
    return f"\n\nNot run: {'; '.join(told)}." if told else ""


def _versions(rows: Sequence[Row]) -> str:
    commits = dict.fromkeys(r["commit"] for r in rows)
    packages = dict.fromkeys(r["package"] for r in rows if r["package"])
    versions = [f"{k} {v}" for k, v in rows[-1]["versions"].items() if k != "parashoot"]
    copies = f"copies at {rows[-1]['copy_gb_s']:.0f} GB/s"
    return ", ".join([f"commit {' and '.join(commits)}", *versions, *packages, copies])


def _by(key: str, rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row[key], []).append(row)
    return found
