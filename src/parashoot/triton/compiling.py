"""When kernels are compiled: those of one pass at the same time, and those of the backward pass while the forward pass begins."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor
from triton.runtime import cache

Job = tuple[Any, tuple[int, ...], dict[str, Any]]  # a kernel, its grid, its arguments

# Lengths compile nothing new.
_CONSTANTS = {"BD", "NC", "SPAN", "FAST", "MASKED", "ALONE", "WIDE", "ROWS", "WIDTH", "num_warps", "maxnreg"}
# Before 3.12 garbage is collected inside Python's parser, which lets in another thread that parses, and fails (cpython gh-106905).
THREADS = sys.version_info >= (3, 12)
_compiled: set[tuple] = set()
_begun: dict[tuple, list[Future]] = {}


def compile_together(jobs: list[Job], x: Tensor, follow: Callable[[], list[Job]] | None = None) -> None:
    """Compile what is new among kernels to launch on the GPU of x, and begin with those that are to `follow`.

    Their tensors may be on the device "meta". Most of the compiler runs outside Python's lock.
    """
    key = _key(jobs, x)
    if key in _compiled:
        return
    if (hashed := hashing()) is not None:
        hashed.exception()  # waits
    for future in _begun.pop(key, []):
        future.exception()  # waits; what failed is compiled again, where the error is seen
    if not THREADS or torch.cuda.is_current_stream_capturing():
        return  # each compiles when it is launched
    _compiled.add(key)
    if follow is not None and (later := _key(made := follow(), x)) not in _compiled and later not in _begun:
        _begun[later] = _begin(made, x.device)
    if len(jobs) > 1:
        for future in _begin(jobs, x.device):
            future.result()


@functools.cache
def hashing() -> Future[str] | None:
    """Triton's hash of its own files, part of the name under which it keeps what it compiled: it takes a third of a second, outside
    Python's lock, and so is begun before a cell is traced. None where it cannot be."""
    key = getattr(cache, "triton_key", None)  # which remembers it
    return _submitted([key])[0] if THREADS and key is not None else None


def compile_now(jobs: list[Job], device: torch.device) -> None:
    """Compile what differs among many launches, as many kernels at once as there are cores; what fails is compiled again when launched."""
    if THREADS:
        different = {(id(job[0]), _fixed(job)): job for job in jobs}
        for future in _begin(list(different.values()), device, os.cpu_count()):
            future.exception()  # waits


def _key(jobs: list[Job], x: Tensor) -> tuple:
    return (*(id(kernel) for kernel, _, _ in jobs), tuple(map(_fixed, jobs)), x.dtype, x.device)


def _fixed(job: Job) -> tuple:
    """The arguments for which a kernel is compiled anew; tensors by whether they are there."""
    return tuple((k, v) for k, v in job[2].items() if k in _CONSTANTS or v is None)


def _begin(jobs: list[Job], device: torch.device, at_once: int | None = None) -> list[Future]:
    def compile_one(job: Job) -> None:
        kernel, grid, arguments = job
        with torch.cuda.device(device):
            kernel.warmup(**arguments, grid=grid)

    return _submitted([functools.partial(compile_one, job) for job in jobs], at_once)


def _submitted(calls: list[Callable[[], Any]], at_once: int | None = None) -> list[Future]:
    """Each call in a thread of its own, or in one of `at_once`, which end with them."""
    pool = ThreadPoolExecutor(at_once or len(calls))
    futures = [pool.submit(call) for call in calls]
    pool.shutdown(wait=False)
    return futures
