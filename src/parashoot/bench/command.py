"""`parashoot bench`: run suites, write rows as they come, print a table; or render a README block from rows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ..errors import BackendError, bad_value
from . import rows as results
from .measure import Session, measure
from .ours import OURS
from .peers import THEIRS
from .suites import SUITES
from .timing import DeviceLost, copy_bandwidth

CONTESTANTS = {c.name: c for c in (*OURS, *THEIRS)}


def run(
    names: Sequence[str],
    out: Path,
    *,
    device: str | None = None,
    contestants: str | None = None,
    repeats: int = 20,
    minutes: float = math.inf,
    commit: str | None = None,
) -> int:
    """Measure the suites called `names`, appending rows to `out` case by case; exit code 0, or 130 if interrupted.

    `contestants`: names separated by commas, instead of the suites' own. After `minutes` no further contestant is begun.
    """
    suites = {name: _find(SUITES, name, "SUITE") for name in names or ("quick",)}
    chosen = [_find(CONTESTANTS, name, "--contestants") for name in contestants.split(",")] if contestants else None
    if repeats < 3:
        bad_value("--repeats", str(repeats), "an integer >= 3")
    if not minutes > 0:
        bad_value("--minutes", str(minutes), "a number > 0")
    place, begun = _device(device), time.monotonic()
    bandwidth = copy_bandwidth(place)
    session = Session(place, bandwidth, repeats, begun + 60 * minutes)
    facts = results.surroundings(place, bandwidth, commit)
    versions = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    print(f"{facts['device']}, commit {facts['commit']}, {versions}, copies at {bandwidth / 1e9:.0f} GB/s", flush=True)
    plan = [
        (name, case, chosen or [CONTESTANTS[c] for c in s.contestants])
        for name, s in suites.items()
        for case in s.cases
    ]
    written, interrupted = [], False
    tf32, torch.backends.cudnn.allow_tf32 = torch.backends.cudnn.allow_tf32, False  # fp32 is to mean fp32 for everyone
    try:
        for number, (name, case, asked) in enumerate(plan, 1):
            if session.over():
                print(f"Out of time: {len(plan) - number + 1} of {len(plan)} cases not run.")
                break
            print(f"[{number}/{len(plan)}, {time.monotonic() - begun:.0f} s] {name}: {case}", flush=True)
            found, interrupted = measure(case, [c for c in asked if c.fits(case)], session)
            found = [{"suite": name, **row, **facts} for row in found]
            results.append(out, found)
            written += found
            if interrupted:
                break
    except KeyboardInterrupt:
        interrupted = True
    except DeviceLost as e:
        raise BackendError(
            f"--device: the GPU fails from the contestant named last on: {e}. Leave that one out with --contestants; "
            f"{len(written)} rows are in {out}."
        ) from e
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        if written:
            print(f"\n{results.table(written)}\n\n{len(written)} rows added to {out}", flush=True)
    return 130 if interrupted else 0


def _find(table: dict, name: str, argument: str):
    if name not in table:
        bad_value(argument, repr(name), f"one of {', '.join(table)}")
    return table[name]


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        bad_value("--device", repr(name), "cpu or cuda")
    if device.type not in ("cpu", "cuda") or (device.type == "cuda" and not torch.cuda.is_available()):
        bad_value("--device", repr(name), "cpu, or cuda where there is a GPU")
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
        torch.cuda.set_device(device)
    return device
