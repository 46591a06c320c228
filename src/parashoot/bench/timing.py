"""Seconds, honestly: CUDA graphs where they can be captured, events or the wall clock elsewhere, always over cold inputs."""

from __future__ import annotations

import contextlib
import gc
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .contest import Entry

Call = Callable[[], Any]


class DeviceLost(RuntimeError):
    """The GPU reports an error that every later call would meet too."""


class Sampler:
    """Seconds of one call, sampled again and again; `method` says how.

    `less` lists what the summary subtracts: other samplers, each times a number.
    """

    def __init__(self, method: str, once: Callable[[], float], less: Sequence[tuple[int, Sampler]] = ()):
        self.method, self.once, self.less = method, once, list(less)
        self.seconds: list[float] = []
        self.spent = 0.0

    def sample(self) -> None:
        """Take one more."""
        start = time.perf_counter()
        self.seconds.append(self.once())
        self.spent += time.perf_counter() - start

    def microseconds(self) -> list[float]:
        """p20, median and p80, less the medians of what is subtracted."""
        less = sum(times * statistics.median(other.seconds) for times, other in self.less)
        return [round(float(v - less) * 1e6, 3) for v in np.percentile(self.seconds, (20, 50, 80))]


def cold_inputs(entry: Entry, train: bool) -> list[tuple[Tensor, ...]]:
    """The entry's inputs and as many copies as it takes for them not to fit in the GPU's L2 cache together.

    None where a run takes so long that reading its inputs is nothing.
    """
    device, size = entry.inputs[0].device, sum(v.nbytes for v in entry.inputs)
    if device.type != "cuda" or _events([_forward(entry, train, entry.inputs)])() > 1e-2:
        return [entry.inputs]
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 50 * 2**20)
    count = 1 if size >= 4 * cache else min(16, math.ceil(4 * cache / size))
    copies = [tuple(v.detach().clone().requires_grad_(v.requires_grad) for v in entry.inputs) for _ in range(count - 1)]
    return [entry.inputs, *copies]


def forward_sampler(entry: Entry, inputs: Sequence[tuple[Tensor, ...]], train: bool) -> Sampler:
    """The forward pass over `inputs` in turn, as it runs in training or without gradients."""
    calls, problem = [_forward(entry, train, batch) for batch in inputs], ""
    if entry.graph and entry.inputs[0].is_cuda:
        try:
            return Sampler("graph", graphed(calls))
        except Exception as e:
            problem = f", no graph: {first_line(e)}"
        recover(entry.inputs[0].device)
    return Sampler(f"{_clock(entry)}{problem}", _timed(calls, entry))


def backward_sampler(entry: Entry, inputs: Sequence[tuple[Tensor, ...]], forward: Sampler) -> Sampler:
    """The backward pass alone where that can be timed, else both passes less the forward one."""
    y, generator = entry.run(*entry.inputs), torch.Generator(entry.inputs[0].device).manual_seed(2)
    dy = torch.randn(y.shape, dtype=y.dtype, device=y.device, generator=generator)
    del y

    def both(batch: tuple[Tensor, ...]) -> Call:
        return lambda: entry.gradients(entry.run(*batch), batch, dy)

    def alone(batch: tuple[Tensor, ...]) -> Call:
        y = entry.run(*batch)
        return lambda: entry.gradients(y, batch, dy, retain=True)

    ways = [(_clock(entry), lambda calls: _timed(calls, entry))]
    if forward.method == "graph":
        ways.insert(0, ("graph", graphed))
    attempts = [(*way, call) for way in ways for call in (alone, both)]
    for name, build, call in attempts:
        less = [(1, forward)] if call is both else []
        try:
            return Sampler(f"{name} of both - forward" if less else name, build([*map(call, inputs)]), less)
        except Exception:
            if (name, build, call) == attempts[-1]:
                raise
        recover(entry.inputs[0].device)
    raise AssertionError


def graphed(calls: Sequence[Call]) -> Callable[[], float]:
    """Seconds a call by replaying a CUDA graph of `calls`, repeated so that starting the graph does not count."""
    calls[0]()
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a call that waits for the GPU cannot be captured: find out before trying
    try:
        calls[0]()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    repeated, graph = _repeated(calls, _events(calls[:1])()), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in repeated:
            call()
    replay = _events([graph.replay])

    def once() -> float:
        return replay() / len(repeated)  # holding `repeated` also keeps alive the memory that the graph reads

    once()
    return once


@contextlib.contextmanager
def one_stream(device: torch.device) -> Iterator[None]:
    """Run a block on one CUDA stream of its own.

    A graph cannot be captured on the default stream, and a backward pass runs on the stream of its forward pass.
    """
    if device.type != "cuda":
        yield
        return
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        yield
        torch.cuda.synchronize()


def copy_bandwidth(device: torch.device, size: int | None = None) -> float:
    """Bytes a second, read and written together, of a copy far larger than any cache; median of 20."""
    size = size or (2**30 if device.type == "cuda" else 2**27)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    once = (_events if device.type == "cuda" else _wall)([lambda: target.copy_(source)])
    once()
    return 2 * size / statistics.median(once() for _ in range(20))


def recover(device: torch.device) -> None:
    """Free what is no longer used. Raises `DeviceLost` if the GPU no longer works."""
    gc.collect()
    if device.type == "cuda":
        try:
            torch.cuda.synchronize()
        except Exception as e:
            raise DeviceLost(first_line(e)) from e
        torch.cuda.empty_cache()


def first_line(e: BaseException) -> str:
    """An exception in a line."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]


def _forward(entry: Entry, train: bool, inputs: tuple[Tensor, ...]) -> Call:
    def call() -> Tensor:
        with torch.set_grad_enabled(train):
            return entry.run(*inputs)

    return call


def _clock(entry: Entry) -> str:
    return "events" if entry.inputs[0].is_cuda else "wall clock"


def _timed(calls: Sequence[Call], entry: Entry) -> Callable[[], float]:
    make = _events if entry.inputs[0].is_cuda else _wall
    for call in calls[:2]:
        call()
    return make(_repeated(calls, make(calls[:1])()))


def _repeated(calls: Sequence[Call], seconds: float) -> list[Call]:
    """The calls in turn, each at least once, for some two milliseconds, at most 40."""
    count = max(len(calls), min(40, math.ceil(2e-3 / max(seconds, 1e-7))))
    return list(itertools.islice(itertools.cycle(calls), count))


def _events(calls: Sequence[Call]) -> Callable[[], float]:
    def once() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(calls)

    return once


def _wall(calls: Sequence[Call]) -> Callable[[], float]:
    def once() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    return once
