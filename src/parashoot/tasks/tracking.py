"""Tasks of state: what a finite automaton is in after reading the sequence."""

from __future__ import annotations

import functools
import itertools

import numpy as np

from .task import IGNORED, Draw, Words, numbers, task


@task(lambda: numbers(2))
def parity(draw: Draw, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Is the number of ones so far odd? Asked at every position.

    >>> print(TASKS["parity"].build(0, length=10).show())
    in  0 1 1 1 1 1 0 1 1 1
    out 0 1 0 1 0 1 1 0 1 0

    Source: Danieli et al. 2025 (ParaRNN, arXiv 2510.21450), Grazzi et al. 2024 (arXiv 2411.12537).
    """
    x = draw.below(2, length)
    return x, np.bitwise_xor.accumulate(x, 1)


@task(lambda size: (["stay", "+1", "-1", "_"], numbers(size)[0]), "last")
def cycle(draw: Draw, length: int, size: int = 5, shortest: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """Where on a cycle do these steps lead, from 0? Asked at the end.

    >>> print(TASKS["cycle"].build(0, length=6).show())
    in    -1 stay stay stay   +1   -1
    out    .    .    .    .    .    4

    With `shortest` the walks have that many steps or more, and blanks after them. Source: Deletang et al. 2022 (arXiv 2207.02098).
    """
    x, ends = draw.below(3, length), draw.lengths(length, shortest)[:, None] - 1
    at = np.cumsum(np.array([0, 1, -1])[x], 1) % size
    t = np.arange(length)
    return np.where(t > ends, 3, x), np.where(t == ends, at, IGNORED)


@functools.cache
def group(name: str) -> tuple[tuple[str, ...], np.ndarray]:
    """The elements of a group in words, and its table of products: z60, s3, s5 or a5.

    A permutation is written as the images of 1, 2, ...; in the product p q, p acts first.
    """
    kind, size = name[0], int(name[1:])
    if kind == "z":
        k = np.arange(size)
        return tuple(map(str, range(size))), (k[:, None] + k) % size
    inversions = lambda p: sum(a > b for a, b in itertools.combinations(p, 2))
    members = [p for p in itertools.permutations(range(size)) if kind == "s" or inversions(p) % 2 == 0]
    index = {p: k for k, p in enumerate(members)}
    table = [[index[tuple(q[i] for i in p)] for q in members] for p in members]
    return tuple("".join(str(i + 1) for i in p) for p in members), np.array(table)


def group_words(over: str) -> Words:
    """The elements, as inputs and as targets."""
    return group(over)[0], group(over)[0]


def word_problem(draw: Draw, length: int, over: str) -> tuple[np.ndarray, np.ndarray]:
    """What is the product of the elements so far? Asked at every position, over Z60, S3, S5 or A5.

    >>> print(TASKS["s3"].build(0, length=6).show())
    in  312 321 123 321 123 231
    out 312 132 132 312 312 123

    y_t = x_1 x_2 ... x_t. Source: Liu et al. 2022 (arXiv 2210.10749), Merrill et al. 2024 (arXiv 2404.08819).
    """
    table = group(over)[1]
    x = draw.below(len(table), length)
    y = x.copy()
    for t in range(1, length):
        y[:, t] = table[y[:, t - 1], x[:, t]]
    return x, y


z60, s3, s5, a5 = (task(group_words, name=name, over=name)(word_problem) for name in ("z60", "s3", "s5", "a5"))
