"""One case, all its contestants: agreement, memory and time, as rows."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from typing import Any

import torch

from ..errors import BackendError
from .agreement import agreement, backward_truth, forward_truth
from .case import Case, problem
from .contest import Contestant, Entry, Skip
from .ours import cell_truth
from .timing import DeviceLost, Sampler, backward_sampler, cold_inputs, first_line, forward_sampler, one_stream, recover

LONGEST = 2.0  # seconds spent on the samples of one pass, once it has three


@dataclass
class Lane:
    """A contestant in a case: its row so far and what is sampled for it."""

    row: dict[str, Any]
    passes: dict[str, Sampler] = field(default_factory=dict)

    def samplers(self) -> list[Sampler]:
        """Every sampler once, those that are subtracted included."""
        return list(dict.fromkeys(s for p in self.passes.values() for s in (p, *(other for _, other in p.less))))

    def sample(self) -> None:
        """Take a sample of everything, or drop out."""
        try:
            for sampler in self.samplers():
                if len(sampler.seconds) < 3 or sampler.spent < LONGEST:
                    sampler.sample()
        except Exception as e:
            self.drop(e)

    def drop(self, e: Exception) -> None:
        """List the contestant as skipped, with the reason."""
        if isinstance(e, (Skip, BackendError)):
            reason = " ".join(str(e).split())
        elif isinstance(e, torch.OutOfMemoryError):
            reason = "out of memory"
        else:
            reason = f"{type(e).__name__}: {first_line(e)}"
        self.row.update(status="skipped", reason=reason)
        self.passes = {}


@dataclass(frozen=True)
class Session:
    """What all cases of a run share: the device, its copy bandwidth in bytes a second, how many samples, and until when."""

    device: torch.device
    bandwidth: float
    repeats: int = 20
    deadline: float = math.inf

    def over(self) -> bool:
        """Whether the time is used up (`time.monotonic()` is past the deadline)."""
        return time.monotonic() > self.deadline


def measure(case: Case, contestants: Sequence[Contestant], session: Session) -> tuple[list[dict[str, Any]], bool]:
    """Rows of one case, and whether Ctrl-C cut the sampling short.

    The contestants' samples are interleaved, so that a change of the machine's pace meets them all. Past the deadline no
    further contestant is begun.
    """
    lanes, interrupted = [], False
    try:
        with one_stream(session.device):
            for contestant in contestants:
                if session.over():
                    break
                print(f"  {contestant.name}: ", end="", flush=True)
                lanes.append(_lane(case, contestant, session))
                print(_news(lanes[-1].row), flush=True)
            try:
                for _ in range(session.repeats):
                    for lane in lanes:
                        lane.sample()
            except KeyboardInterrupt:
                interrupted = True
            return [_finished(lane) for lane in lanes if all(s.seconds for s in lane.samplers())], interrupted
    finally:
        lanes.clear()
        for cache in (problem, cell_truth, forward_truth, backward_truth):
            cache.cache_clear()
        recover(session.device)


def _lane(case: Case, contestant: Contestant, session: Session) -> Lane:
    about = {"contestant": contestant.name, "about": contestant.about, "package": _version(contestant.package)}
    lane, train = Lane({**asdict(case), **about}), case.mode == "train"
    try:
        if contestant.longest is not None and case.time > contestant.longest:
            raise Skip(f"run up to T = {contestant.longest} only")
        entry = contestant.enter(case, session.device)
        lane.row |= asdict(agreement(entry, case.time, train)) | _sizes(entry, train, session.bandwidth)
        lane.passes = _passes(entry, train)
        return lane
    except DeviceLost:
        raise
    except Exception as e:
        lane.drop(e)
    recover(session.device)
    return lane


def _passes(entry: Entry, train: bool) -> dict[str, Sampler]:
    """Samplers of the forward and, in training, the backward pass, less what is no part of the recurrence."""
    inputs = cold_inputs(entry, train)
    passes = {"forward": forward_sampler(entry, inputs, train)}
    if train:
        passes["backward"] = backward_sampler(entry, inputs, passes["forward"])
    if entry.extra:
        for name, sampler in _passes(entry.extra, train).items():
            passes[name].less += (1, sampler), *((-times, other) for times, other in sampler.less)
    return passes


def _sizes(entry: Entry, train: bool, bandwidth: float) -> dict[str, Any]:
    """Floors in microseconds; on CUDA also bytes at the peak, beside the inputs, and bytes saved for backward, beside y."""
    on_gpu = entry.inputs[0].is_cuda
    recover(entry.inputs[0].device)
    start = torch.cuda.memory_allocated() if on_gpu else 0
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    with torch.set_grad_enabled(train):
        y = entry.run(*entry.inputs)
    held = torch.cuda.memory_allocated() - start - y.nbytes if on_gpu else None
    floors = entry.floors(y)
    if train:
        entry.gradients(y, entry.inputs, torch.ones_like(y))
    peak = torch.cuda.max_memory_allocated() - start if on_gpu else None
    return {
        "floor_us": [round(v / bandwidth * 1e6, 3) for v in floors[: 1 + train]],
        "peak_bytes": peak, "saved_bytes": held if train else None,
    }  # fmt: skip


def _finished(lane: Lane) -> dict[str, Any]:
    for name, sampler in lane.passes.items():
        lane.row |= {
            f"{name}_us": sampler.microseconds(),
            f"{name}_by": sampler.method,
            "samples": len(sampler.seconds),
        }
    return lane.row


def _news(row: dict[str, Any]) -> str:
    return f"skipped: {row['reason']}" if row["status"] == "skipped" else f"{row['status']}, error {row['error']:.1e}"


def _version(package: str) -> str | None:
    """'name version' of an installed package."""
    try:
        return f"{package} {metadata.version(package)}" if package else None
    except metadata.PackageNotFoundError:
        return None
