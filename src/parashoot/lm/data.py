"""Token data on disk and the windows that training draws from it.

A data directory, as `parashoot data` writes it: `index.json`, for each split its shards (raw little-endian tokens) and a file of
document starts (uint64 offsets into the split), and the tokenizer if there is one. All of it is memory-mapped, not read.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import bad_value
from .order import Permutation, mix

INDEX, TOKENIZER = "index.json", "tokenizer.json"
FORMAT = 1
DTYPES = {"uint8": "<u1", "uint16": "<u2", "uint32": "<u4"}
SPLITS = ("train", "validation", "test")
CORPUS = "sotu.txt.xz"
VALIDATION = 0.05
AGAIN = "Prepare the data again with: parashoot data"


@dataclass(frozen=True)
class Tokens:
    """One split as one long sequence: its `shards` one after the other, documents beginning at the offsets `starts`.

    `bytes` of text it stands for; `name` for messages.
    """

    name: str
    shards: list[np.ndarray]
    starts: np.ndarray
    bytes: int
    _ends: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "_ends", np.cumsum([s.shape[0] for s in self.shards], dtype=np.int64))

    def __len__(self) -> int:
        return int(self._ends[-1]) if self.shards else 0

    def read(self, start: int, stop: int) -> np.ndarray:
        """Tokens start..stop-1 (stop - start,) int64, across shards."""
        parts, k = [], int(np.searchsorted(self._ends, start, side="right"))
        while start < stop:
            base = int(self._ends[k]) - self.shards[k].shape[0]
            end = min(stop, int(self._ends[k]))
            parts.append(self.shards[k][start - base : end - base].astype(np.int64))
            start, k = end, k + 1
        return np.concatenate(parts) if parts else np.empty(0, np.int64)

    def resets(self, start: int, stop: int) -> np.ndarray:
        """(stop - start,) bool: whether a document begins at each of the tokens start..stop-1."""
        found = np.zeros(stop - start, bool)
        ends = np.array((start, stop), np.uint64)  # of another type they would have the whole index copied
        first, last = np.searchsorted(self.starts, ends)
        found[self.starts[first:last].astype(np.int64) - start] = True
        return found


@dataclass(frozen=True)
class Data:
    """A data set: `vocab_size`, the token `eot` that begins each document (None: none does), its splits by name, a
    `fingerprint` of the content, and the tokenizer's file or None (tokens are bytes)."""

    vocab_size: int
    eot: int | None
    splits: dict[str, Tokens]
    fingerprint: str
    tokenizer: Path | None = None

    def fitting(self, vocab_size: int) -> Data:
        """This, if a model of `vocab_size` tokens knows all of its tokens. Raises `ArgumentError`."""
        if self.vocab_size > vocab_size:
            bad_value("model.vocab_size", str(vocab_size), f"at least {self.vocab_size}, the vocabulary of the data")
        return self

    def split(self, name: str) -> Tokens:
        """One split. Raises `ArgumentError` naming those that there are."""
        if name not in self.splits:
            bad_value("split", repr(name), f"one of {', '.join(self.splits)}")
        return self.splits[name]


def open_data(directory: str | Path | None) -> Data:
    """The data set that `parashoot data` wrote to `directory`; None: the shipped corpus as bytes.

    Raises `ArgumentError` if the index is missing or of another format, or a file is missing or has another size than it says.
    """
    if directory is None:
        return corpus()
    directory = Path(directory)
    text = read_index(directory)
    index = json.loads(text)
    kind, splits = np.dtype(DTYPES[index["dtype"]]), {}
    for name, facts in index["splits"].items():
        shards = [_mapped(directory / s["file"], kind, s["tokens"]) for s in facts["shards"]]
        starts = _mapped(directory / facts["starts"]["file"], np.dtype("<u8"), facts["documents"])
        splits[name] = Tokens(f"{name} of {directory}", shards, starts, facts["bytes"])
    tokenizer = directory / index["tokenizer"]["file"] if index["tokenizer"] else None
    return Data(index["vocab_size"], index["eot"], splits, hashlib.sha256(text.encode()).hexdigest(), tokenizer)


def read_index(directory: Path) -> str:
    """The text of a data directory's index, checked to be one of this format."""
    path = directory / INDEX
    if not path.is_file():
        bad_value("data", f"'{directory}'", f"a directory with an {INDEX}", "Make one with: parashoot data DIR --help")
    try:
        text = path.read_text()
        index = json.loads(text)
    except ValueError as e:
        bad_value("data", f"'{path}', which is not JSON ({e})", "an index", AGAIN)
    if not isinstance(index, dict) or index.get("format") != FORMAT or index.get("dtype") not in DTYPES:
        bad_value("data", f"'{path}', written by something else", f"an index of parashoot, format {FORMAT}", AGAIN)
    return text


def check_data(directory: Path) -> int:
    """Compare every file of a data directory with the SHA-256 in its index; their number. Raises `ArgumentError`."""
    open_data(directory)  # sizes first
    index = json.loads(read_index(directory))
    files = [f for s in index["splits"].values() for f in (*s["shards"], s["starts"])]
    files += [index["tokenizer"]] if index["tokenizer"] else []
    for facts in files:
        with open(directory / facts["file"], "rb") as file:
            came = hashlib.file_digest(file, "sha256").hexdigest()
        if came != facts["sha256"]:
            bad_value("data", f"'{directory / facts['file']}', SHA-256 {came}", facts["sha256"], AGAIN)
    return len(files)


def _mapped(path: Path, kind: np.dtype, count: int) -> np.ndarray:
    came = path.stat().st_size if path.is_file() else None
    if came != count * kind.itemsize:
        what = "which is missing" if came is None else f"{came:,} bytes"
        bad_value("data", f"'{path}', {what}", f"{count * kind.itemsize:,} bytes, as its index says", AGAIN)
    return np.memmap(path, kind, "r") if count else np.empty(0, kind)


def corpus() -> Data:
    """Addresses of the US presidents since 1893, as bytes: the first 95% for training, the last 5% for validation."""
    text = lzma.decompress((resources.files("parashoot.lm") / "assets" / CORPUS).read_bytes())
    at = round(len(text) * (1 - VALIDATION))
    parts = {"train": text[:at], "validation": text[at:]}
    splits = {k: Tokens(f"{k} of the shipped corpus", [np.frombuffer(v, np.uint8)], np.zeros(1, np.uint64), len(v))
              for k, v in parts.items()}  # fmt: skip
    return Data(256, None, splits, hashlib.sha256(text).hexdigest())


class Windows:
    """Windows of `length` tokens in a shuffled order without end, the same for any number of processes.

    Neighbouring windows share one token, so that an epoch predicts no token twice, and all but less than two windows' worth once; each
    epoch has its own permutation of the windows and its own offset of the first. `epoch` and `position`, the number of windows drawn
    in it, are the whole state.

    Raises `ArgumentError` if the data do not hold one window.
    """

    def __init__(self, tokens: Tokens, length: int, seed: int):
        if len(tokens) < length:
            bad_value("data", f"{len(tokens):,} tokens ({tokens.name})", f"at least a window of {length} tokens")
        self.tokens, self.length, self.seed = tokens, length, seed
        self.count = max(1, (len(tokens) - 1) // (length - 1) - 1)
        self.epoch = self.position = 0

    def draw(self, size: int, rank: int = 0, ranks: int = 1) -> tuple[Tensor, Tensor | None]:
        """Process `rank` of `ranks`'s share of the next `size` windows, and move on by all of them.

        Returns ids (size / ranks, T) int64 and reset (size / ranks, T) bool, True where a document begins; None where the data
        are one document.
        """
        drawn = self._starts(rank * size // ranks, (rank + 1) * size // ranks)
        epochs, self.position = divmod(self.position + size, self.count)
        self.epoch += epochs
        ids = torch.from_numpy(np.stack([self.tokens.read(a, a + self.length) for a in drawn]))
        if len(self.tokens.starts) <= 1:
            return ids, None
        return ids, torch.from_numpy(np.stack([self.tokens.resets(a, a + self.length) for a in drawn]))

    def _starts(self, first: int, last: int) -> list[int]:
        """Where the windows begin that come `first` to `last` - 1 from here."""
        ahead, span, found = self.position + np.arange(first, last), self.length - 1, []
        free = min(span, len(self.tokens) - self.count * span)
        for epoch in np.unique(ahead // self.count):
            offset = mix(self.seed, self.epoch + int(epoch), 1) % free
            windows = Permutation(self.count, mix(self.seed, self.epoch + int(epoch)))
            found += (windows(ahead[ahead // self.count == epoch] % self.count) * span + offset).tolist()
        return found

    def state_dict(self) -> dict[str, Any]:
        """Where it stands."""
        return {"epoch": self.epoch, "position": self.position}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self.epoch, self.position = state["epoch"], state["position"]
