"""The suites by name: which cases, and which contestants are asked to each."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from .case import Case

OURS = ("scan-triton", "scan-torch")
PEERS = (
    "cudnn-gru", "cudnn-lstm", "pararnn-torch", "pararnn-torch-unchecked", "hgrn", "gated-delta", "accelerated-scan", "flashrnn",
)  # fmt: skip


@dataclass(frozen=True)
class Suite:
    """Cases, the names of the contestants, and what the suite shows; `axis` is what a plot of it is against, if one is made."""

    about: str
    cases: tuple[Case, ...]
    contestants: tuple[str, ...]
    axis: str = ""


def _dtypes(cases: Iterable[Case]) -> list[Case]:
    return [replace(case, dtype=dtype) for case in cases for dtype in ("bfloat16", "float32")]


_SHAPES = ((8, 2048, 2048), (8, 2048, 256), (1, 16384, 1024))

SUITES = {
    "quick": Suite(
        "a small case of each kind, in seconds, also on a CPU",
        (
            Case("gru", 2, 512, 32, "float32"),
            Case("lstm", 2, 256, 32, "float32"),
            Case("mingru", 2, 256, 32, "float32", "infer"),
        ),
        (*OURS, "loop"),
    ),
    "table": Suite(
        "every channelwise cell at the size of a language model's layer, and ParaGRU at other sizes",
        (
            *_dtypes(Case("gru", *shape) for shape in _SHAPES),
            *_dtypes([Case("gru", *_SHAPES[0], mode="infer")]),
            Case("gru", 1, 2**20, 256),
            *(Case(cell, *_SHAPES[0]) for cell in ("lstm", "slstm", "elman_diagonal", "mingru")),
        ),
        OURS,
    ),
    "peers": Suite(
        "other people's kernels for the same cell, and for recurrences that are as near as they offer",
        (
            *_dtypes(Case(cell, *shape) for cell in ("gru", "lstm") for shape in _SHAPES),
            *(Case("gru", 8, 2048, 256, "float32", sigma=sigma) for sigma in (1.0, 2.0)),
        ),
        (*OURS, *PEERS),
    ),
    "paper": Suite(
        "the loops that the parallel solution replaces: compiled at T = 512, as in the paper (which gives neither batch nor width), "
        "and as Python runs it at T = 2048",
        (*(Case(cell, 8, 512, 1024, "float32") for cell in ("gru", "lstm")), Case("gru", 8, 2048, 256, "float32")),
        (*OURS, "loop", "loop-graph", "loop-compiled"),
    ),
    "time": Suite(
        "time against the length of the sequence",
        tuple(Case("gru", 1, 2**k, 256) for k in range(7, 21)),
        (*OURS, "loop", "cudnn-gru", "pararnn-torch", "pararnn-torch-unchecked", "hgrn"),
        axis="time",
    ),
    "width": Suite(
        "time against the number of sequences x channels",
        tuple(Case("gru", 8, 2048, 2**k) for k in range(4, 14)),
        (*OURS, "cudnn-gru", "pararnn-torch", "pararnn-torch-unchecked", "hgrn"),
        axis="width",
    ),
}
