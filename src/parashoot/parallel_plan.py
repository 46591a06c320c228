"""Which chunks a parallelized module runs, or none: predicted times of passes over chunks and of the module's own way."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

SHORTEST = 64  # below, a plan costs more than it can gain
GATES = {"GRU": 3, "LSTM": 4, "RNN_TANH": 1, "RNN_RELU": 1}


class Machine(NamedTuple):
    """Seconds to start a pass and a step; multiplications and additions a second; bytes a second at which weights are read."""

    start: float
    step: float
    rate: float
    tf32: float
    half: float
    bandwidth: float
    overlaps: bool  # layers and directions that run plainly share the latency of a step


# Measured on two CPU cores and on an H100.
MACHINES = {
    "cpu": Machine(1e-4, 1e-5, 1.2e11, 1.2e11, 6e10, 4.5e10, False),
    "cuda": Machine(3e-4, 1.2e-5, 2.5e13, 1e14, 2e14, 3e12, True),
}


class Shape(NamedTuple):
    """A recurrent module and what it is to run: sizes as in `torch.nn.LSTM`, `time` steps of the longest sequence, `total` of all."""

    mode: str
    input_size: int
    hidden_size: int
    proj_size: int
    num_layers: int
    directions: int
    time: int
    total: int
    dtype: torch.dtype
    device: str
    tf32: bool
    training: bool


class Cut(NamedTuple):
    """Chunks of `length` steps; passes (forward, backward) made before looking whether they suffice; further passes that
    cost less than one plain call."""

    length: int
    passes: tuple[int, int]
    affordable: float


_GAIN = 0.8  # of the plain time: less is not worth the risk of a wrong prediction
_LENGTHS = tuple(n * k for k in (2**i for i in range(4, 14)) for n in (2, 3)) + (16, 24)


@functools.lru_cache(maxsize=4096)
def choose(shape: Shape, horizons: tuple[tuple[int, int], ...]) -> tuple[Cut, ...] | None:
    """The cut of each layer and direction, given the steps in which it forgets (forward, backward); None: run plainly."""
    found, seconds, plain, latency = [], 0.0, 0.0, MACHINES[shape.device].step * shape.time
    weight = 3 if shape.training else 1
    for k, horizon in enumerate(horizons):
        whole = _pass(shape, k, shape.time)
        lengths = {_even(n, shape.time) for n in sorted(_LENGTHS) if 2 * n <= shape.time}
        if not lengths:
            return None

        def cost(length: int, k: int = k, horizon: tuple[int, int] = horizon) -> float:
            forward, backward = fixed(length, horizon).passes
            each = _pass(shape, k, length)
            return each * (forward + backward) + each / 2 if shape.training else each * forward

        best = min(sorted(lengths), key=cost)
        seconds += cost(best)
        plain += weight * (whole - latency if MACHINES[shape.device].overlaps and k else whole)
        found.append(fixed(best, horizon)._replace(affordable=whole / _pass(shape, k, best)))
    return tuple(found) if seconds < _GAIN * plain else None


def fixed(length: int, horizon: tuple[int, int]) -> Cut:
    """Chunks of that length whatever it costs, with the passes that the `horizon` leads to expect."""
    forward, backward = (1 + math.ceil(min(1.15 * h, 1e9) / length) for h in horizon)
    return Cut(length, (max(forward, 2), max(backward, 2)), math.inf)


def _even(length: int, time: int) -> int:
    """A length at most a quarter longer that divides the time, so that all chunks are of one length; else `length`."""
    return next((n for n in range(length, length + length // 4 + 1) if time % n == 0), length)


def _pass(shape: Shape, k: int, length: int) -> float:
    """Seconds of a forward pass of layer and direction k over chunks of that length."""
    machine, gates = MACHINES[shape.device], GATES[shape.mode] * shape.hidden_size
    state = shape.proj_size or shape.hidden_size
    inputs = shape.input_size if k < shape.directions else state * shape.directions
    rate = machine.tf32 if shape.tf32 else machine.half if shape.dtype.itemsize == 2 else machine.rate
    rate /= 2 if shape.dtype.itemsize == 8 else 1
    rows = max(shape.total / length, shape.total / shape.time)
    step = machine.step + max(2 * rows * gates * state / rate, gates * state * shape.dtype.itemsize / machine.bandwidth)
    return machine.start + length * step + 2 * shape.total * gates * inputs / rate
