"""What a task is: sequences of token ids and targets, each sample a pure function of its number, and how answers are scored."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import bad_type, bad_value

IGNORED = -100
METRICS = ("token", "sequence", "last")
Words = tuple[Sequence[str], Sequence[str]]


class Draw:
    """Random numbers for samples `start` to `start + count` - 1: each call opens a stream in which every sample has its own place.

    So a sample does not depend on which others are drawn with it. The streams are Philox counters (Salmon et al. 2011), keyed by the
    text `identity`.
    """

    def __init__(self, identity: str, start: int, count: int):
        self.start, self.count = start, count
        self._identity, self._calls = identity, 0

    def words(self, width: int) -> np.ndarray:
        """(count, width) uint64, uniform."""
        key = hashlib.sha256(f"{self._identity} {self._calls}".encode()).digest()[:16]
        self._calls += 1
        blocks = -(-width // 4)  # a step of the counter gives four words
        stream = np.random.Philox(key=int.from_bytes(key, "little"), counter=self.start * blocks)
        return stream.random_raw(self.count * 4 * blocks).reshape(self.count, 4 * blocks)[:, :width]

    def below(self, bound: int, width: int) -> np.ndarray:
        """(count, width) int64, uniform in 0..bound-1, for a bound far below 2^32."""
        return scaled(self.words(width), bound)

    def unit(self, width: int) -> np.ndarray:
        """(count, width) float64, uniform in (0, 1)."""
        return ((self.words(width) >> np.uint64(11)) + 0.5) * 2.0**-53

    def distinct(self, bound: int, width: int) -> np.ndarray:
        """(count, width) int64: in each row `width` different numbers of 0..bound-1 in random order (Floyd's algorithm)."""
        words, chosen = self.words(width), np.empty((self.count, width), np.int64)
        for k in range(width):
            last = bound - width + k
            found = scaled(words[:, k], last + 1)
            taken = (chosen[:, :k] == found[:, None]).any(1)
            chosen[:, k] = np.where(taken, last, found)
        return np.take_along_axis(chosen, self.words(width).argsort(1), 1)

    def lengths(self, longest: int, shortest: int | None) -> np.ndarray:
        """(count,) int64: all `longest`, or uniform in shortest..longest."""
        if shortest is None:
            return np.full(self.count, longest)
        if shortest > longest:
            bad_value("shortest", str(shortest), f"at most the length {longest}")
        return shortest + self.below(longest - shortest + 1, 1)[:, 0]


def scaled(words: np.ndarray, bound: Any) -> np.ndarray:
    """Uniform uint64 -> int64 uniform in 0..bound-1."""
    return ((words >> np.uint64(32)) * np.asarray(bound, np.uint64) >> np.uint64(32)).astype(np.int64)


@dataclass(frozen=True)
class Task:
    """A task: `sample(draw, length, **options)` gives inputs and targets, (N, length) int64 both.

    `metric`, one of `METRICS`, is the one that its source reports; `words(**options)` gives the words of input and of target tokens.
    """

    name: str
    sample: Callable[..., tuple[np.ndarray, np.ndarray]]
    words: Callable[..., Words]
    metric: str
    fixed: Mapping[str, Any]

    @cached_property
    def options(self) -> dict[str, Any]:
        """The options, with their defaults."""
        found = list(inspect.signature(self.sample).parameters.values())[2:]
        return {p.name: p.default for p in found if p.name not in self.fixed}

    @property
    def about(self) -> str:
        """What the task asks, in the first paragraph of the docstring."""
        return " ".join(inspect.cleandoc(self.sample.__doc__ or "").split("\n\n")[0].split())

    def build(self, seed: int, *, length: int, split: str = "train", **options: Any) -> Samples:
        """The samples of a seed, split and length: an endless sequence. Raises `ArgumentError` and `ArgumentTypeError`."""
        if not _integer(seed) or seed < 0:
            bad_value("seed", repr(seed), "an integer >= 0")
        if not _integer(length) or length < 1:
            bad_value("length", repr(length), "an integer >= 1")
        for name, value in options.items():
            if name not in self.options:
                bad_value(f"option of {self.name}", repr(name), f"one of {', '.join(self.options) or 'none'}")
            default = self.options[name]
            if isinstance(default, bool):
                if not isinstance(value, bool):
                    bad_type(name, value, "True or False")
            elif not (default is None and value is None) and (not _integer(value) or value < 1):
                bad_value(name, repr(value), "an integer >= 1" + (" or None" if default is None else ""))
        samples = Samples(self, seed, split, length, {**self.options, **options})
        samples.arrays(0, 0)  # what the length and the options do not allow is said here
        return samples


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


@dataclass(frozen=True)
class Samples:
    """Samples 0, 1, 2, ... of a task; sample k depends on task, options, seed, split, length and k alone."""

    task: Task
    seed: int
    split: str
    length: int
    options: dict[str, Any]

    def arrays(self, start: int, count: int) -> tuple[np.ndarray, np.ndarray]:
        """Samples start..start+count-1: inputs and targets (count, length) int64, `IGNORED` where nothing is scored."""
        facts = [self.task.name, sorted(self.options.items()), self.seed, self.split, self.length]
        return self.task.sample(Draw(json.dumps(facts), start, count), self.length, **self.options, **self.task.fixed)

    def batch(self, start: int, count: int) -> tuple[Tensor, Tensor]:
        """`arrays` as tensors."""
        inputs, targets = self.arrays(start, count)
        return torch.from_numpy(inputs), torch.from_numpy(targets)

    @property
    def words(self) -> Words:
        """The words of input tokens and of target tokens, by id."""
        return self.task.words(**{k: v for k, v in self.options.items() if k != "shortest"}, **self.task.fixed)

    @property
    def vocab_size(self) -> int:
        """Ids that inputs and targets together take."""
        return max(map(len, self.words))

    def show(self, k: int = 0) -> str:
        """Sample k in words, "." where nothing is scored."""
        (inputs,), (targets,) = self.arrays(k, 1)
        known, answers = self.words
        rows = [[known[i] for i in inputs], ["." if t == IGNORED else answers[t] for t in targets]]
        width = max(len(word) for row in rows for word in row)
        lines = (" ".join(word.rjust(width) for word in row) for row in rows)
        return "\n".join(f"{name:4}{line}" for name, line in zip(("in", "out"), lines, strict=True))


def numbers(vocab: int) -> Words:
    """Tokens that are called by their ids, in inputs and targets."""
    words = [str(k) for k in range(vocab)]
    return words, words


def task(
    words: Callable[..., Words], metric: str = "token", name: str | None = None, **fixed: Any
) -> Callable[..., Task]:
    """The decorator of a sampler: its task, called `name` or as the function, with the options in `fixed` decided."""
    return lambda sample: Task(name or sample.__name__, sample, words, metric, fixed)


def find_task(name: str) -> Task:
    """The task called `name`. Raises `ArgumentError` naming those that exist."""
    from . import TASKS

    if not isinstance(name, str) or name not in TASKS:
        bad_value("task", repr(name), f"one of {', '.join(TASKS)}")
    return TASKS[name]


def tally(predicted: Tensor, targets: Tensor) -> Tensor:
    """Right answers and answers scored, a row for each of `METRICS`: (3, 2) int64 that adds up over batches.

    predicted, targets (B, T). token: each scored position; sequence: all of a sequence's; last: a sequence's last one. Sequences
    in which nothing is scored do not count.
    """
    scored = targets != IGNORED
    right = (predicted == targets) & scored
    asked = scored.any(1)
    at = scored.long().cumsum(1).argmax(1, keepdim=True)  # the first place of the largest count: the last one scored
    last = right.gather(1, at)[:, 0] & asked
    whole = (right == scored).all(1) & asked
    return torch.stack([torch.stack([a.sum(), b.sum()]) for a, b in ((right, scored), (whole, asked), (last, asked))])


def rates(counts: Tensor) -> dict[str, float]:
    """Share of right answers by metric, from a `tally`; zero where nothing was scored."""
    return {name: right / max(of, 1) for name, (right, of) in zip(METRICS, counts.tolist(), strict=True)}
