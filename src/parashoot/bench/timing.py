"""Seconds, honestly: replays of CUDA graphs where they can be captured, events or the wall clock elsewhere, over cold inputs."""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .contest import Entry

Call = Callable[[], Any]
Clock = Callable[[], float]  # seconds of one call, measured anew each time


def clocks(entry: Entry, train: bool) -> tuple[int | None, str, dict[str, Clock]]:
    """Bytes at the peak beside inputs (None on a CPU), how the entry is timed, and clocks of "forward" and, in training, "both".

    The backward pass alone is the difference: not every contestant can repeat it after one forward pass.
    """
    with torch.no_grad():
        dy = torch.randn_like(entry.run(*entry.inputs))

    def forward(inputs: Sequence[Tensor]) -> Tensor:
        with torch.set_grad_enabled(train):
            return entry.run(*inputs)

    def both(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
        return entry.gradients(entry.run(*inputs), inputs, dy)

    passes = {"forward": forward, "both": both} if train else {"forward": forward}
    if not dy.is_cuda:
        return None, "wall clock", {name: wall(in_turn(call, entry.inputs)) for name, call in passes.items()}
    torch.cuda.reset_peak_memory_stats()
    start, problem = torch.cuda.memory_allocated(), ""
    (both if train else forward)(entry.inputs)
    peak = torch.cuda.max_memory_allocated() - start
    calls = {name: in_turn(call, entry.inputs) for name, call in passes.items()}
    if entry.graph:
        try:
            return peak, "graph", {name: graphed(c) for name, c in calls.items()}
        except Exception as e:
            problem = f", no graph: {first_line(e)}"
    return peak, f"events{problem}", {name: events(c) for name, c in calls.items()}


def in_turn(call: Callable[[Sequence[Tensor]], Any], inputs: Sequence[Tensor]) -> list[Call]:
    """Calls for some two milliseconds, at most 40, on the inputs and on as many copies as overflow the GPU's L2 cache.

    No copies where a call takes so long that reading its inputs is nothing.
    """
    call(inputs)
    gpu, turns = inputs[0].is_cuda, [inputs]
    seconds = (events if gpu else wall)([partial(call, inputs)])()
    if gpu and seconds < 1e-2:
        cache = torch.cuda.get_device_properties(inputs[0].device).L2_cache_size
        copies = min(16, math.ceil(4 * cache / sum(v.nbytes for v in inputs))) - 1
        turns += [[v.detach().clone().requires_grad_() for v in inputs] for _ in range(copies)]
    count = max(len(turns), min(40, math.ceil(2e-3 / seconds)))
    return [partial(call, turn) for turn in itertools.islice(itertools.cycle(turns), count)]


def graphed(calls: Sequence[Call]) -> Clock:
    """Replays a CUDA graph of all `calls`; the current stream must not be the default one."""
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")  # a call that waits for the GPU cannot be captured: find out before trying
    try:
        calls[0]()
    finally:
        torch.cuda.set_sync_debug_mode(before)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
        for call in calls:
            call()
    replay = events([graph.replay])
    replay()
    return lambda: replay() / len(calls)  # holding `calls` also keeps alive the memory that the graph reads


def events(calls: Sequence[Call]) -> Clock:
    """Launches `calls` between two CUDA events."""

    def once() -> float:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        for call in calls:
            call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) * 1e-3 / len(calls)

    return once


def wall(calls: Sequence[Call]) -> Clock:
    """Runs `calls` between two looks at the clock."""

    def once() -> float:
        start = time.perf_counter()
        for call in calls:
            call()
        return (time.perf_counter() - start) / len(calls)

    return once


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written together, of a copy far larger than any cache: median of 20, the faster of two ways."""
    gpu = device.type == "cuda"
    source = torch.ones(2**28 if gpu else 2**25, device=device)  # 1 GiB, 128 MiB
    target = torch.empty_like(source)
    ways = map(events if gpu else wall, ([lambda: target.copy_(source)], [lambda: torch.neg(source, out=target)]))
    return 2 * source.nbytes / min(statistics.median(way() for _ in range(20)) for way in ways)


def first_line(e: BaseException) -> str:
    """An exception in a line."""
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
