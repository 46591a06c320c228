"""`parashoot bench`: suites, case by case, contestants side by side; rows go to the results file as they come."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import BackendError, bad_value
from . import results
from .cases import SUITES, Case
from .contestants import CONTESTANTS
from .rows import add_rows, open_rows
from .trial import Clock, Contestant, agreement, clocks, copy_bandwidth, first_line

LONGEST = 4.0  # seconds spent on the samples of one contestant in a case, once it has three


@dataclass
class Lane:
    """A contestant in a case: its row so far, its clocks and what they showed."""

    row: dict[str, Any]
    clocks: dict[str, Clock] = field(default_factory=dict)
    seconds: dict[str, list[float]] = field(default_factory=dict)
    spent: float = 0.0

    def enter(self, case: Case, contestant: Contestant, device: torch.device, bandwidth: float) -> None:
        """Compare with the loop, count the bytes that must move once (backward: twice), make the clocks ready."""
        if case.time > contestant.longest:
            raise BackendError(f"run up to T = {contestant.longest} only")
        entry, train = contestant.enter(case, device), case.mode == "train"
        self.row |= agreement(entry, train)
        outputs = case.batch * case.time * case.channels * case.storage.itemsize
        floor = (outputs + sum(v.nbytes for v in entry.inputs)) / bandwidth * 1e6
        self.row["floor_us"] = [floor, 2 * floor] if train else [floor]
        self.row["peak_bytes"], self.row["timed_by"], self.clocks = clocks(entry, train)
        self.seconds = {name: [] for name in self.clocks}

    def sample(self) -> None:
        """Look at each clock once, unless they have had their time."""
        if self.spent < LONGEST or any(len(taken) < 3 for taken in self.seconds.values()):
            begun = time.perf_counter()
            for name, clock in self.clocks.items():
                self.seconds[name].append(clock())
            self.spent += time.perf_counter() - begun

    def attempt(self, step: Callable[..., None], *arguments: Any) -> None:
        """Call `step`; whatever it raises becomes the reason in a row that says "skipped"."""
        try:
            step(*arguments)
        except Exception as e:
            kind = "" if isinstance(e, BackendError) else f"{type(e).__name__}: "
            self.row |= {"status": "skipped", "reason": kind + first_line(e)}
            self.clocks, self.seconds = {}, {}

    def finished(self) -> dict[str, Any]:
        """The row with p20, median and p80 of each pass in microseconds."""
        for name, taken in self.seconds.items():
            less = statistics.median(self.seconds["forward"]) if name == "both" else 0.0
            times = [round(float(v - less) * 1e6, 3) for v in np.percentile(taken, (20, 50, 80))]
            self.row |= {"backward_us" if name == "both" else "forward_us": times, "samples": len(taken)}
        return self.row


def measure(
    case: Case, contestants: Sequence[Contestant], device: torch.device, bandwidth: float, repeats: int, deadline: float
) -> tuple[list[results.Row], bool]:
    """Rows of one case, and whether Ctrl-C cut it short, keeping what has samples. No one begins past `deadline`."""
    lanes, interrupted = [], False
    # A graph cannot be captured on the default stream, and a backward pass runs on the stream of its forward pass.
    with torch.cuda.stream(torch.cuda.Stream() if device.type == "cuda" else None):
        try:
            for contestant in contestants:
                if time.monotonic() > deadline:
                    break
                gc.collect()
                torch.cuda.empty_cache()
                package = contestant.package and f"{contestant.package} {results.version(contestant.package)}"
                lane = Lane({"case": str(case), **asdict(case), "contestant": contestant.name, "package": package})
                lane.attempt(lane.enter, case, contestant, device, bandwidth)
                lanes.append(lane)
                told = lane.row.get("reason") or f"error {lane.row['error']:.1e}"
                print(f"  {contestant.name}: {lane.row['status']}, {told}", flush=True)
            for _ in range(repeats):
                for lane in lanes:  # interleaved, so that a change of the machine's pace meets all contestants
                    lane.attempt(lane.sample)
        except KeyboardInterrupt:
            interrupted = True
    return [lane.finished() for lane in lanes if all(lane.seconds.values())], interrupted


def run(
    names: Sequence[str], out: Path, *, device: str | None = None, contestants: str | None = None, repeats: int = 20,
    minutes: float = math.inf, commit: str | None = None, cases: str = "",
) -> int:  # fmt: skip
    """Measure the suites called `names`, those of their cases that have `cases` in their names, appending rows to `out` case by case;
    exit code 0, or 130 if interrupted."""
    suites = {name: _find(SUITES, name, "SUITE") for name in names or ("quick",)}
    only = [_find(CONTESTANTS, name, "--contestants").name for name in contestants.split(",")] if contestants else None
    if repeats < 3:
        bad_value("--repeats", str(repeats), "an integer >= 3")
    if not minutes > 0:
        bad_value("--minutes", str(minutes), "a number > 0")
    known = [str(case) for suite in suites.values() for case in suite.cases]
    if not any(cases in name for name in known):
        bad_value("--cases", repr(cases), f"a part of the name of one of: {', '.join(known)}")
    kinds = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    place, begun = torch.device(_find({k: k for k in kinds}, device or kinds[-1], "--device")), time.monotonic()
    open_rows(out, "--out")
    if out.is_file():
        results.read(out, "--out")
    deadline, bandwidth = begun + 60 * minutes, copy_bandwidth(place)
    facts = {**results.facts(place, commit), "copy_gb_s": bandwidth / 1e9}
    print(f"{facts['device']}, commit {facts['commit']}, copies at {facts['copy_gb_s']:.0f} GB/s", flush=True)
    plan = [(name, case, only or suite.contestants) for name, suite in suites.items() for case in suite.cases]
    plan = [entry for entry in plan if cases in str(entry[1])]
    written, interrupted = [], False
    torch.backends.cudnn.allow_tf32 = False  # fp32 is to mean fp32 for everyone
    for number, (name, case, asked) in enumerate(plan):
        if interrupted or time.monotonic() > deadline:
            print(f"Stopped: {len(plan) - number} of {len(plan)} cases not run.")
            break
        print(f"[{number + 1}/{len(plan)}, {time.monotonic() - begun:.0f} s] {name}: {case}", flush=True)
        fitting = [CONTESTANTS[c] for c in asked if CONTESTANTS[c].fits(case)]
        found, interrupted = measure(case, fitting, place, bandwidth, repeats, deadline)
        rows = [{"suite": name, **row, **facts} for row in found]
        add_rows(out, rows)
        written += rows
    if written:
        print(f"\n{results.tables(written)}\n\n{len(written)} rows added to {out}", flush=True)
    return 130 if interrupted else 0


def _find(table: dict[str, Any], name: str, argument: str) -> Any:
    if name not in table:
        bad_value(argument, repr(name), f"one of {', '.join(table)}")
    return table[name]
