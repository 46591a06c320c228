"""The synthetic tasks against oracles that are written differently: by definition, by `eval`, by a stack, by explicit loops."""

from __future__ import annotations

import doctest
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

from parashoot.errors import ArgumentError, ArgumentTypeError
from parashoot.tasks import IGNORED, TASKS, Samples, rates, tally
from parashoot.tasks.tracking import group

SMALL: dict[str, dict[str, Any]] = {"mqar": {"vocab": 40}, "selective_copy": {"tokens": 5}}


def build(name: str, length: int = 40, seed: int = 0, **options: Any) -> Samples:
    return TASKS[name].build(seed, length=length, **{**SMALL.get(name, {}), **options})


def in_words(samples: Samples, count: int) -> Iterator[tuple[list, list]]:
    known, answers = samples.words
    inputs, targets = samples.arrays(0, count)
    for x, y in zip(inputs.tolist(), targets.tolist(), strict=True):
        yield [known[i] for i in x], [None if t == IGNORED else answers[t] for t in y]


def keep_nth(x: list[str], n: int = 5) -> list[str | None]:
    return [x[n - 1] if t >= n - 1 else None for t in range(len(x))]


def parity(x: list[str]) -> list[str | None]:
    return [str(x[: t + 1].count("1") % 2) for t in range(len(x))]


def mqar(x: list[str], pairs: int = 2) -> list[str | None]:
    book = dict(zip(x[0 : 2 * pairs : 2], x[1 : 2 * pairs : 2], strict=True))
    assert len(book) == pairs and sorted(k for k in x[2 * pairs :] if k != "0") == sorted(book)
    return [book[k] if k != "0" and t >= 2 * pairs else None for t, k in enumerate(x)]


def khop(x: list[str], k: int = 1) -> list[str | None]:
    def find(i: int) -> int | None:
        return max((j for j in range(1, i + 1) if x[j - 1] == x[i]), default=None)

    def hops(i: int) -> str | None:
        for _ in range(k):
            found = find(i)
            if found is None:
                return None
            i = found
        return x[i]

    return [hops(i) for i in range(len(x))]


def selective_copy(x: list[str], tokens: int = 5) -> list[str | None]:
    assert x[-tokens:] == ["?"] * tokens
    return [None] * (len(x) - tokens) + [w for w in x if w not in "_?"]  # type: ignore[list-item]


def cycle(x: list[str], size: int = 5) -> list[str | None]:
    steps = [w for w in x if w != "_"]
    assert x[: len(steps)] == steps
    place = 0
    for w in steps:
        place += {"stay": 0, "+1": 1, "-1": size - 1}[w]
    return [str(place % size) if t == len(steps) - 1 else None for t in range(len(x))]


def evaluated(x: list[str], modulus: int = 5) -> list[str | None]:
    text = "".join(x).rstrip("_")
    assert "_" not in text
    return [str(eval(text) % modulus) if t == len(text) - 1 else None for t in range(len(x))]


def evaluated_at_digits(x: list[str]) -> list[str | None]:
    ends = [t for t, word in enumerate(x) if word.isdigit()]
    return [evaluated(x[: t + 1])[t] if t in ends else None for t in range(len(x))]


def closed_at_digits(x: list[str]) -> list[str | None]:
    text = "".join(x).rstrip("_")
    found: list[str | None] = [None] * len(x)
    for t in (*(t for t, word in enumerate(x) if word.isdigit()), len(text) - 1):
        read = text[: t + 1]
        found[t] = str(eval(read + ")" * (read.count("(") - read.count(")"))) % 5)
    return found


def composed(x: list[str]) -> list[str | None]:
    found, so_far = [], list(range(len(x[0])))
    for word in x:
        so_far = [int(word[i]) - 1 for i in so_far]
        found.append("".join(str(i + 1) for i in so_far))
    return found


def sums(x: list[str]) -> list[str | None]:
    return [str(sum(map(int, x[: t + 1])) % 60) for t in range(len(x))]


def dyck(x: list[str]) -> list[str | None]:
    stack, found = [], []
    for word, after in itertools.pairwise([*x, "end"]):
        if word[0] == "(":
            stack.append(word[1:])
            assert len(stack) <= 8
        else:
            assert stack.pop() == word[1:]
        found.append(f"){stack[-1]}" if after[0] == ")" else None)
    return found


ORACLES: dict[str, Callable[[list[str]], list[str | None]]] = {
    "keep_nth": keep_nth, "parity": parity, "mqar": mqar, "khop": khop, "selective_copy": selective_copy, "cycle": cycle,
    "arithmetic": evaluated, "brackets": evaluated, "z60": sums, "s3": composed, "s5": composed, "a5": composed, "dyck": dyck,
}  # fmt: skip
every_task = pytest.mark.parametrize("name", TASKS)


@every_task
def test_targets_are_the_oracles(name):
    for x, y in in_words(build(name), 200):
        assert y == ORACLES[name](x)


@pytest.mark.parametrize(
    ("name", "length", "options"),
    [
        ("cycle", 12, {"shortest": 3, "size": 7}),
        ("arithmetic", 12, {"shortest": 2}),
        ("arithmetic", 1, {}),
        ("arithmetic", 12, {"every": True}),
        ("arithmetic", 13, {"every": True, "shortest": 2}),
        ("brackets", 25, {"shortest": 1, "multiply": True}),
        ("brackets", 40, {"every": True}),
        ("brackets", 25, {"every": True, "shortest": 1, "multiply": True}),
        ("brackets", 100, {"multiply": True}),
        ("keep_nth", 5, {"n": 5}),
        ("khop", 60, {"k": 2, "vocab": 5}),
        ("khop", 60, {"k": 3, "vocab": 4}),
        ("mqar", 64, {"pairs": 16, "vocab": 200}),
        ("mqar", 8, {"pairs": 2, "vocab": 6}),
    ],
)
def test_options_and_edges(name, length, options):
    known = {k: v for k, v in options.items() if k in ("size", "n", "k", "pairs")}
    at_digits = {"arithmetic": evaluated_at_digits, "brackets": closed_at_digits}
    seen = set()
    for x, y in in_words(build(name, length, **options), 200):
        assert y == (at_digits[name](x) if "every" in options else ORACLES[name](x, **known))
        seen.add(len("".join(x).rstrip("_")))
    assert len(seen) > 1 if "shortest" in options else seen


@every_task
def test_a_sample_depends_on_its_number_alone(name):
    samples = build(name)
    whole = samples.arrays(0, 50)
    for start, count in ((0, 1), (7, 13), (49, 1), (20, 30)):
        for mine, all_of_them in zip(build(name).arrays(start, count), whole, strict=True):
            assert (mine == all_of_them[start : start + count]).all()
    others = [build(name, seed=1), TASKS[name].build(0, length=40, split="test", **SMALL.get(name, {}))]
    assert all((other.arrays(0, 50)[0] != whole[0]).any() for other in others)
    rows = {tuple(row) for row in whole[0]}
    assert rows.isdisjoint(tuple(row) for other in others for row in other.arrays(0, 50)[0])


@every_task
def test_shapes_ids_and_batches(name):
    samples = build(name, length=31)
    x, y = samples.batch(3, 20)
    assert x.dtype == y.dtype == torch.int64 and x.shape == y.shape == (20, 31)
    scored = y != IGNORED
    assert x.min() >= 0 and x.max() < len(samples.words[0]) and scored.any(1).all()
    assert y[scored].min() >= 0 and y[scored].max() < len(samples.words[1]) <= samples.vocab_size


@pytest.mark.parametrize(
    "name", ["keep_nth", "parity", "mqar", "selective_copy", "cycle", "z60", "s3", "s5", "a5", "dyck"]
)
def test_targets_are_balanced(name):
    options = {"vocab": 8} if name == "keep_nth" else {}
    samples = build(name, **options)
    y = samples.arrays(0, 4000)[1]
    last = y[np.arange(len(y)), np.where(y != IGNORED, np.arange(y.shape[1]), -1).max(1)]
    counts = np.unique(last[last != IGNORED], return_counts=True)[1]
    expected = {"mqar": 20, "dyck": 8}.get(name, len(samples.words[1]))
    assert len(counts) == expected
    # A count's deviation is below sqrt(mean); six of them are beyond chance for a hundred counts.
    assert abs(counts - counts.mean()).max() < 6 * counts.mean() ** 0.5


def test_the_groups_are_groups():
    for name, order in {"z60": 60, "s3": 6, "s5": 120, "a5": 60}.items():
        words, table = group(name)
        assert len(set(words)) == order
        assert all(len(set(row)) == order for row in [*table, *table.T])
        assert (table[table] == table[np.arange(order)[:, None, None], table[None]]).all()  # (p q) r = p (q r)


@every_task
def test_the_example_in_the_docstring(name):
    sample = TASKS[name].sample
    test = doctest.DocTestParser().get_doctest(sample.__doc__ or "", {"TASKS": TASKS}, name, None, 0)
    assert len(test.examples) == 1
    assert doctest.DocTestRunner().run(test).failed == 0
    assert TASKS[name].about.endswith((".", "?"))


def test_metrics():
    targets = torch.tensor([[1, 2, IGNORED], [3, IGNORED, 4], [IGNORED, IGNORED, IGNORED], [5, 6, 7]])
    predicted = torch.tensor([[1, 2, 9], [0, 9, 4], [0, 0, 0], [5, 6, 0]])
    counts = tally(predicted, targets)
    assert counts.tolist() == [[5, 7], [1, 3], [2, 3]]
    assert rates(counts) == {"token": 5 / 7, "sequence": 1 / 3, "last": 2 / 3}
    assert rates(tally(targets, targets)) == {"token": 1.0, "sequence": 1.0, "last": 1.0}
    assert rates(tally(predicted[2:3], targets[2:3])) == {"token": 0.0, "sequence": 0.0, "last": 0.0}
    assert (tally(predicted[:2], targets[:2]) + tally(predicted[2:], targets[2:]) == counts).all()


@pytest.mark.parametrize(
    ("name", "arguments", "words"),
    [
        ("parity", {"length": 0}, "length: got 0"),
        ("parity", {"length": 8, "seed": -1}, "seed: got -1"),
        ("parity", {"length": 8, "n": 1}, "option of parity: got 'n'; expected one of none"),
        ("keep_nth", {"length": 3}, "length: got 3; expected at least 5"),
        ("keep_nth", {"length": 8, "n": True}, "n: got True"),
        ("mqar", {"length": 7}, "length: got 7; expected at least 8"),
        ("mqar", {"length": 64, "vocab": 4}, "vocab: got 4; expected at least 6"),
        ("mqar", {"length": 64, "noise": 1}, "noise: got int 1; expected True or False"),
        ("selective_copy", {"length": 31}, "at least 32"),
        ("cycle", {"length": 8, "shortest": 9}, "shortest: got 9; expected at most the length 8"),
        ("dyck", {"length": 1}, "length: got 1"),
    ],
)
def test_what_cannot_be_built_says_why(name, arguments, words):
    with pytest.raises((ArgumentError, ArgumentTypeError), match=re.escape(words)):
        TASKS[name].build(**{"seed": 0, **arguments})
