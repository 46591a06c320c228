"""Tasks of memory: keep a token, recall a pair, look up what followed, copy a selection."""

from __future__ import annotations

import numpy as np

from ..errors import bad_value
from .task import IGNORED, Draw, numbers, task


@task(lambda vocab, n: numbers(vocab))
def keep_nth(draw: Draw, length: int, n: int = 5, vocab: int = 128) -> tuple[np.ndarray, np.ndarray]:
    """What was the n-th token? Asked at every position from the n-th on.

    >>> print(TASKS["keep_nth"].build(0, length=8, n=3, vocab=10).show())
    in  8 8 8 2 3 4 0 5
    out . . 8 8 8 8 8 8

    Source: Danieli et al. 2025 (ParaRNN, arXiv 2510.21450).
    """
    _at_least(length, n)
    x = draw.below(vocab, length)
    y = np.full_like(x, IGNORED)
    y[:, n - 1 :] = x[:, n - 1 : n]
    return x, y


@task(lambda vocab, **_: numbers(vocab))
def mqar(
    draw: Draw, length: int, pairs: int = 2, vocab: int = 128, noise: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """Which value came with this key? Key-value pairs first, then each key once more, mostly soon: answer with its value.

    >>> print(TASKS["mqar"].build(0, length=16, pairs=2, vocab=20).show())
    in   1 13  2 15  2  0  0  0  0  0  0  0  1  0  0  0
    out  .  .  .  . 15  .  .  .  .  .  .  . 13  .  .  .

    Keys are 1..V/2-1, values V/2..V-1, all different in a sample. Query i stands at 2 (pairs + gap_i), the gaps drawn without
    replacement with probability proportional to gap^(a - 1), a = 0.01. Between them stands the blank 0, or, with `noise`, any token.
    The harder form: vocab=8192, length 64 to 512, 4 to 64 pairs. Source: Arora et al. 2023 (Zoology, arXiv 2312.04927).
    """
    half, space = vocab // 2, (length - 2 * pairs) // 2
    if space < pairs:
        bad_value("length", str(length), f"at least {4 * pairs}: {pairs} pairs, and room to ask for each")
    if half - 1 < pairs:
        bad_value("vocab", str(vocab), f"at least {2 * pairs + 2} for {pairs} different keys")
    keys, values = 1 + draw.distinct(half - 1, pairs), half + draw.distinct(vocab - half, pairs)
    x = draw.below(vocab, length) if noise else np.zeros((draw.count, length), np.int64)
    y = np.full_like(x, IGNORED)
    x[:, 0 : 2 * pairs : 2], x[:, 1 : 2 * pairs : 2] = keys, values
    # The largest of log p + Gumbel noise, in order, are draws without replacement.
    weight = -0.99 * np.log(np.arange(1, space + 1)) - np.log(-np.log(draw.unit(space)))
    at = 2 * (pairs + np.argsort(-weight, 1)[:, :pairs])
    np.put_along_axis(x, at, keys, 1)
    np.put_along_axis(y, at, values, 1)
    return x, y


@task(lambda vocab, k: numbers(vocab))
def khop(draw: Draw, length: int, k: int = 1, vocab: int = 10) -> tuple[np.ndarray, np.ndarray]:
    """What followed the last time that this token came, k times over? k = 1 is induction.

    >>> print(TASKS["khop"].build(0, length=12, vocab=4).show())
    in  0 3 2 0 3 3 3 2 2 0 2 2
    out . . . 3 2 3 3 0 2 3 0 2

    find(i) = max {j <= i: x_(j-1) = x_i}, y_i = x_(find^k(i)), not scored where there is none. Source: Sanford et al. 2024
    (arXiv 2402.09268).
    """
    x, rows = draw.below(vocab, length), np.arange(draw.count)
    last, hop = np.full((draw.count, vocab), -2), np.empty_like(x)
    for t in range(length):
        hop[:, t] = last[rows, x[:, t]] + 1
        last[rows, x[:, t]] = t
    at = hop
    for _ in range(k - 1):
        at = np.where(at < 0, -1, np.take_along_axis(hop, at.clip(0), 1))
    return x, np.where(at < 0, IGNORED, np.take_along_axis(x, at.clip(0), 1))


@task(lambda tokens, vocab: ([*numbers(vocab)[0], "_", "?"], numbers(vocab)[0]))
def selective_copy(draw: Draw, length: int, tokens: int = 16, vocab: int = 16) -> tuple[np.ndarray, np.ndarray]:
    """Which tokens stood among the blanks, in order? Asked in the last positions, one after another.

    >>> print(TASKS["selective_copy"].build(0, length=12, tokens=3).show())
    in  2 _ _ _ 4 _ 0 _ _ ? ? ?
    out . . . . . . . . . 2 4 0

    Source: Gu and Dao 2023 (Mamba, arXiv 2312.00752), there with 4096 positions before the answer.
    """
    _at_least(length, 2 * tokens)
    context = length - tokens
    places = np.sort(np.argsort(draw.words(context), 1)[:, :tokens], 1)
    found = draw.below(vocab, tokens)
    x = np.full((draw.count, length), vocab)
    np.put_along_axis(x, places, found, 1)
    x[:, context:] = vocab + 1
    y = np.full_like(x, IGNORED)
    y[:, context:] = found
    return x, y


def _at_least(length: int, least: int) -> None:
    if length < least:
        bad_value("length", str(length), f"at least {least} with these options")
