"""Tasks of formal languages: modular arithmetic, with and without brackets, and well-nested brackets."""

from __future__ import annotations

import numpy as np

from ..errors import bad_value
from .task import IGNORED, Draw, Words, numbers, scaled, task


def arithmetic_words(modulus: int, **_: object) -> Words:
    """Digits, operators, brackets and the blank; digits."""
    digits = numbers(modulus)[0]
    return [*digits, "+", "-", "*", "(", ")", "_"], digits


@task(arithmetic_words, "last")
def arithmetic(
    draw: Draw, length: int, modulus: int = 5, every: bool = False, shortest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What is the value of this expression without brackets, modulo a number? Asked at its end, or, with `every`, at every digit.

    >>> print(TASKS["arithmetic"].build(0, length=7).show())
    in  3 * 4 - 2 * 0
    out . . . . . . 2

    Digits, and between them +, - or *, which binds tighter. An expression has an odd number of tokens: from an even length one is
    left blank. With `shortest` expressions have about that many tokens or more, and blanks after them. Source: Deletang et al. 2022
    (arXiv 2207.02098).
    """
    count = (length + 1) // 2
    digits, operators = draw.below(modulus, count), draw.below(3, count)
    ends = (draw.lengths(length, shortest)[:, None] - 1) // 2 * 2
    x = np.full((draw.count, length), modulus + 5)
    x[:, 0::2] = digits
    x[:, 1 : 2 * count - 1 : 2] = modulus + operators[:, 1:]
    y = np.full_like(x, IGNORED)
    total, term = np.zeros(draw.count, np.int64), np.zeros(draw.count, np.int64)
    for k in range(count):
        d, op = digits[:, k], operators[:, k] if k else np.zeros(draw.count, np.int64)
        total = np.where(op == 2, total, total + term) % modulus
        term = np.where(op == 2, term * d, np.where(op == 1, -d, d)) % modulus
        y[:, 2 * k] = (total + term) % modulus
    t = np.arange(length)
    asked = t <= ends if every else t == ends
    return np.where(t > ends, modulus + 5, x), np.where(asked, y, IGNORED)


@task(arithmetic_words, "last")
def brackets(
    draw: Draw, length: int, modulus: int = 5, multiply: bool = False, every: bool = False, shortest: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """What is the value of this expression with brackets, modulo a number? Asked at its end, or, with `every`, at every digit too.

    >>> print(TASKS["brackets"].build(0, length=11, every=True).show())
    in  ( ( 1 - ( 0 ) ) + 0 )
    out . . 1 . . 1 . . . 1 1

    E(1) = d, E(2) = -d, E(3) = (d), E(4) = (-d), E(n) = (E(l) op E(n - l - 3)) with l uniform in 1..n-4, op + or - or, with
    `multiply`, *. At a digit asked is the value of what is read, its open brackets closed. With `shortest` expressions have that many
    tokens or more, and blanks after them. Source: Deletang et al. 2022 (arXiv 2207.02098).
    """
    plus, minus, opening, closing, blank = modulus, modulus + 1, modulus + 3, modulus + 4, modulus + 5
    size, row = draw.lengths(length, shortest), np.arange(draw.count)
    digits, splits, operators = draw.below(modulus, length), draw.words(length), draw.below(2 + multiply, length)
    x, value, rounds = np.full((draw.count, length), blank), np.zeros((draw.count, length), np.int64), []
    leaves: list[tuple[np.ndarray, ...]] = []
    begin, ends = np.zeros_like(row), size - 1
    while len(row):  # the expressions of one depth: their samples, first positions and sizes
        small, inside, negative = size <= 4, size >= 3, size % 2 == 0
        r, at, sign = row[small], (begin + inside + negative)[small], negative[small]
        x[r, at] = digits[r, at]
        leaves.append((r, begin[small], at))
        value[r, begin[small]] = np.where(sign, -digits[r, at], digits[r, at]) % modulus
        x[r[sign], at[sign] - 1] = minus
        x[row[inside], begin[inside]], x[row[inside], (begin + size - 1)[inside]] = opening, closing
        r, b, n = row[~small], begin[~small], size[~small]
        left = 1 + scaled(splits[r, b], n - 4)
        middle = b + 1 + left
        x[r, middle] = plus + operators[r, middle]
        rounds.append((r, b, middle))
        row, begin, size = np.tile(r, 2), np.concatenate([b + 1, middle + 1]), np.concatenate([left, n - left - 3])
    for r, b, middle in reversed(rounds):
        p, q = value[r, b + 1], value[r, middle + 1]
        value[r, b] = np.choose(operators[r, middle], [p + q, p - q, p * q]) % modulus
    y = np.where(np.arange(length) == ends[:, None], value[:, :1], IGNORED)
    if not every:
        return x, y
    # The whole so far is scale v + shift, where v is the value of a part that begins here.
    scale, shift = np.ones_like(value), np.zeros_like(value)
    for r, b, middle in rounds:
        a, s, p, op = scale[r, b], shift[r, b], value[r, b + 1], operators[r, middle]
        scale[r, b + 1], shift[r, b + 1] = a, s
        scale[r, middle + 1] = np.choose(op, [a, -a, a * p]) % modulus
        shift[r, middle + 1] = np.choose(op, [s + a * p, s + a * p, s]) % modulus
    for r, b, at in leaves:
        y[r, at] = (scale[r, b] * value[r, b] + shift[r, b]) % modulus
    return x, y


def bracket_words(kinds: int, depth: int) -> Words:
    """Opening and closing brackets, as inputs and as targets."""
    words = [side + str(k) for side in "()" for k in range(kinds)]
    return words, words


@task(bracket_words)
def dyck(draw: Draw, length: int, kinds: int = 8, depth: int = 8) -> tuple[np.ndarray, np.ndarray]:
    """Which bracket closes next? Asked before each closing bracket of well-nested brackets of several kinds, of bounded depth.

    >>> print(TASKS["dyck"].build(0, length=9, kinds=2).show())
    in  (0 (1 (0 )0 )1 (1 (1 (1 )1
    out  .  . )0 )1  .  .  . )1  .

    A bracket opens or closes with probability 1/2 each where both are allowed. Source: Hewitt et al. 2020 (arXiv 2010.07515).
    """
    if length < 2:
        bad_value("length", str(length), "at least 2")
    coins, names, rows = draw.below(2, length), draw.below(kinds, length), np.arange(draw.count)
    stack, level, x = np.zeros((draw.count, depth), np.int64), np.zeros(draw.count, np.int64), np.empty_like(coins)
    for t in range(length):
        opens = (level == 0) | ((level < depth) & (coins[:, t] == 1))
        x[:, t] = np.where(opens, names[:, t], kinds + stack[rows, level - 1])
        stack[rows[opens], level[opens]] = names[opens, t]
        level += np.where(opens, 1, -1)
    y = np.full_like(x, IGNORED)
    y[:, :-1] = np.where(x[:, 1:] >= kinds, x[:, 1:], IGNORED)
    return x, y
