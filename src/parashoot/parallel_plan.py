"""Which chunks a parallelized module runs, or none: predicted times of passes over chunks and of the module's own way."""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import torch

SHORTEST = 64  # below, a plan costs more than it can gain
GATES = {"GRU": 3, "LSTM": 4, "RNN_TANH": 1, "RNN_RELU": 1}


class Machine(NamedTuple):
    """Seconds to start a pass, and of a step (forward, backward) by mode; multiplications and additions a second, the same in
    TF32 and in 16 bits (each of a CPU's threads); bytes a second at which weights are read; whether a GPU's: then layers that run plainly
    share the latency of a step, and few rows' products wait for the weights; the part of the plain time beyond which a predicted gain is
    not worth the risk."""

    start: float
    step: dict[str, tuple[float, float]]
    rate: float
    tf32: float
    half: float
    bandwidth: float
    gpu: bool
    gain: float


# From measurements on two CPU cores and on an H100. An LSTM's steps on a CPU, which are fused there, are set below the measured 3 us: chunks
# lose that fusion, which the model does not know of.
_ON_CPU = {"GRU": (9e-6, 6e-5), "LSTM": (5e-7, 1e-6), "RNN_TANH": (3e-6, 1.8e-5), "RNN_RELU": (3e-6, 1.8e-5)}
MACHINES = {
    "cpu": Machine(5e-4, _ON_CPU, 6e10, 6e10, 3e10, 4.5e10, False, 0.55),
    "cuda": Machine(1e-3, dict.fromkeys(GATES, (1.2e-5, 1.2e-5)), 2.5e13, 1e14, 2e14, 1e12, True, 0.8),
    "graphs": Machine(
        5e-5, dict.fromkeys(GATES, (6e-6, 6e-6)), 2.5e13, 1e14, 2e14, 3e12, True, 0.8
    ),  # passes recorded in CUDA graphs
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
    threads: int
    tf32: bool
    training: bool


class Cut(NamedTuple):
    """Chunks of `length` steps; those that a first guess takes; passes (forward, backward) made before looking whether they suffice;
    further passes that cost less than one plain call."""

    length: int
    lead: int
    passes: tuple[int, int]
    affordable: float


_UNEVEN = 1.2  # chunks of two lengths run in kernels for packed sequences
_LENGTHS = tuple(n * 2**i for i in range(2, 13) for n in (4, 5, 6, 7))


@functools.lru_cache(maxsize=4096)
def choose(
    shape: Shape, horizons: tuple[tuple[int, int], ...], recorded: bool = False, faster: float = 1.0
) -> tuple[Cut, ...] | None:
    """The cut of each layer and direction, given the steps in which it forgets (forward, backward); None: run plainly.

    `recorded`: for passes in CUDA graphs, with some room for cells that come to remember longer. `faster`: how many times faster than
    predicted the module's own way was when it was timed.
    """
    if recorded:
        horizons = tuple((math.ceil(1.2 * ahead), math.ceil(1.2 * back)) for ahead, back in horizons)
    lengths = sorted({_even(n, shape.time) for n in _LENGTHS if 2 * n <= shape.time})
    if not lengths:
        return None
    machine, found, seconds = MACHINES[shape.device], [], 0.0
    chunked = MACHINES["graphs"] if recorded else machine
    for k, horizon in enumerate(horizons):
        costs = {n: _cost(shape, k, fixed(n, horizon), chunked) for n in lengths}
        best = min(costs, key=costs.__getitem__)
        seconds += costs[best]
        affordable = _pass(shape, k, shape.time, 0, machine) / _pass(shape, k, best, 0, machine)
        found.append(fixed(best, horizon)._replace(affordable=affordable / faster))
    return tuple(found) if seconds < machine.gain * plainly(shape) / faster else None


def plainly(shape: Shape) -> float:
    """Seconds, as predicted, that the module's own way takes."""
    machine, seconds = MACHINES[shape.device], 0.0
    for k in range(shape.num_layers * shape.directions):
        seconds += _cost(shape, k, Cut(shape.time, 0, (1, 1), 0.0), machine)
        if machine.gpu and k:
            seconds -= shape.time * sum(machine.step[shape.mode][: 1 + shape.training])
    return seconds


def fixed(length: int, horizon: tuple[int, int]) -> Cut:
    """Chunks of that length whatever it costs, with the passes that the `horizon` leads to expect."""
    forward, backward = (math.ceil(min(1.15 * h, 1e9)) for h in horizon)
    passes = (1 + max(math.ceil(forward / length), 1), 1 + max(math.ceil(backward / length), 1))
    lead = max(forward, backward, 1)
    return Cut(length, lead if 4 * lead <= 3 * length else length, passes, math.inf)


def _even(length: int, time: int) -> int:
    """A length at most a quarter longer that divides the time, so that all chunks are of one length; else `length`."""
    return next((n for n in range(length, length + length // 4 + 1) if time % n == 0), length)


def _cost(shape: Shape, k: int, cut: Cut, machine: Machine) -> float:
    """Seconds of layer and direction k: passes forward, and in training backward and for the weights (half a pass)."""
    forward, backward = (_pass(shape, k, cut.length, way, machine) for way in (0, 1))
    guess = cut.lead / cut.length if shape.time % cut.length == 0 else 1.0
    passes = [1 if n == 1 else n - 1 + guess for n in cut.passes]
    return passes[0] * forward + (passes[1] + 0.5) * backward * shape.training


def _pass(shape: Shape, k: int, length: int, way: int, machine: Machine) -> float:
    """Seconds of a pass forward (0) or backward (1) over chunks of that length."""
    gates, state = GATES[shape.mode] * shape.hidden_size, shape.proj_size or shape.hidden_size
    inputs = _inputs(shape, k)
    rate = machine.tf32 if shape.tf32 else machine.half if shape.dtype.itemsize == 2 else machine.rate
    rate *= shape.threads / (2 if shape.dtype.itemsize == 8 else 1)
    rows = max(shape.total / length, shape.total / shape.time)
    times = 2 * rows * gates * state / rate, gates * state * shape.dtype.itemsize / machine.bandwidth
    step = sum(times) if machine.gpu else max(times)
    seconds = length * (machine.step[shape.mode][way] + step) + 2 * shape.total * gates * inputs / rate
    if length < shape.time:
        seconds = machine.start + seconds * (_UNEVEN if shape.time % length else 1)
    return seconds


def kept(shape: Shape) -> int:
    """Bytes, about, that a recording of all layers keeps: inputs, gates, states and what is made of them."""
    state = shape.proj_size or shape.hidden_size
    numbers = sum(
        _inputs(shape, k) + GATES[shape.mode] * shape.hidden_size + 4 * state
        for k in range(shape.num_layers * shape.directions)
    )
    return shape.total * numbers * shape.dtype.itemsize


def _inputs(shape: Shape, k: int) -> int:
    """Channels that layer and direction k reads."""
    return shape.input_size if k < shape.directions else (shape.proj_size or shape.hidden_size) * shape.directions
