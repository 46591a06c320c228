"""`parashoot data`: text from a source to a directory of token shards, written whole or not at all."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from ..errors import bad_value
from .data import DTYPES, FORMAT, INDEX, SPLITS, TOKENIZER
from .sources import Piece, Source
from .tokenizer import Bytes, Subwords

SHARD = 1 << 27  # tokens
BATCH = 64  # pieces encoded together
LAST = (INDEX, "config.json")  # without which a directory is none of data or of a model


def prepare(directory: Path, source: Source, tokenizer: Bytes | Subwords, *, shard: int = SHARD) -> dict[str, Any]:
    """Write the tokens of `source` to a new `directory`, shards of at most `shard` tokens; returns the index.

    Raises `ArgumentError` if the directory is there and not empty, or if the source has no text to train on.
    """
    with new_directory(directory) as beside:
        return _write(beside, source, tokenizer, shard)


@contextlib.contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """A directory to write to, which takes the place of `directory` if nothing goes wrong and is removed otherwise.

    An empty directory that is there stays, and is filled, what names the rest last: a disk may be mounted or a shell stand there. Raises
    `ArgumentError` if it is not empty.
    """
    directory = check_new(directory)
    moved: list[Path] = []
    name, filled = f"{directory.name}.partial-{os.getpid()}", directory.exists()
    beside = directory / name if filled else directory.with_name(name)
    beside.mkdir(parents=True)
    try:
        yield beside
        if filled:
            check_new(directory)  # another process may have filled it meanwhile
            for path in sorted(beside.iterdir(), key=lambda p: p.name in LAST):
                moved.append(directory / path.name)
                os.replace(path, moved[-1])
        else:
            os.replace(beside, directory)
    except BaseException:  # Ctrl-C, too
        for path in moved:
            path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_new(directory: Path) -> Path:
    """Where `directory` lies, links followed. Raises `ArgumentError` if something is there that is not an empty directory; what killed
    processes left does not count."""
    try:
        directory = directory.resolve()
    except RuntimeError:
        bad_value("OUT", f"'{directory}', links that lead to themselves", "a new directory")
    left = f"{directory.name}.partial-"
    if directory.exists() and (not directory.is_dir() or any(not p.name.startswith(left) for p in directory.iterdir())):
        bad_value("OUT", f"'{directory}', which is there already", "a new directory")
    return directory


def _write(directory: Path, source: Source, tokenizer: Bytes | Subwords, shard: int) -> dict[str, Any]:
    dtype = next(d for d in DTYPES if tokenizer.vocab_size <= 1 << np.iinfo(d).bits)
    writers = {name: _Split(directory, name, np.dtype(DTYPES[dtype]), shard) for name in SPLITS}
    with tqdm(desc="tokenizing", unit="B", unit_scale=True) as bar:
        for pieces in _batches(source()):
            for piece, tokens in zip(pieces, tokenizer.encode([p.text for p in pieces]), strict=True):
                writers[piece.split].add(piece, tokens, tokenizer.eot)
                bar.update(len(piece.text))
    if not writers["train"].tokens:
        bad_value("source", "no text for the training split", "some text")
    kept = None
    if isinstance(tokenizer, Subwords):
        tokenizer.tokenizer.save(str(directory / TOKENIZER))
        kept = {"file": TOKENIZER, "sha256": hashlib.sha256((directory / TOKENIZER).read_bytes()).hexdigest()}
    index = {
        "format": FORMAT, "dtype": dtype, "vocab_size": tokenizer.vocab_size, "eot": tokenizer.eot, "tokenizer": kept,
        "splits": {name: writer.close() for name, writer in writers.items() if writer.tokens},
    }  # fmt: skip
    (directory / INDEX).write_text(json.dumps(index, indent=1) + "\n")
    return index


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    for piece in pieces:
        batch.append(piece)
        if len(batch) == BATCH:
            yield batch
            batch = []
    if batch:
        yield batch


class _Split:
    """The shards of one split and the starts of its documents, as they are written."""

    def __init__(self, directory: Path, name: str, kind: np.dtype, shard: int):
        self.directory, self.name, self.kind, self.shard = directory, name, kind, shard
        self.tokens = self.bytes = self.documents = 0
        self.file: _File | None = None
        self.shards: list[dict[str, Any]] = []
        self.starts: _File | None = None

    def add(self, piece: Piece, tokens: bytes | list[int], eot: int | None) -> None:
        if self.starts is None:
            self.starts = _File(self.directory / f"{self.name}-documents.bin")
        if piece.begins:
            self.starts.write(np.array([self.tokens], "<u8").tobytes())
            self.documents += 1
            if eot is not None:
                self._append(np.array([eot], self.kind))
        self.bytes += len(piece.text)
        self._append(np.frombuffer(tokens, np.uint8) if isinstance(tokens, bytes) else np.array(tokens, self.kind))

    def _append(self, tokens: np.ndarray) -> None:
        while tokens.size:
            self.file = self.file or _File(self.directory / f"{self.name}-{len(self.shards):05d}.bin")
            room = self.shard - self.tokens % self.shard
            self.file.write(tokens[:room].astype(self.kind).tobytes())
            self.tokens += min(room, tokens.size)
            tokens = tokens[room:]
            if self.tokens % self.shard == 0:
                self._close_shard(self.shard)

    def _close_shard(self, tokens: int) -> None:
        if self.file is not None:
            self.shards.append({**self.file.close(), "tokens": tokens})
            self.file = None

    def close(self) -> dict[str, Any]:
        """This split's part of the index."""
        assert self.starts is not None
        self._close_shard(self.tokens % self.shard)
        return {
            "tokens": self.tokens, "bytes": self.bytes, "documents": self.documents, "starts": self.starts.close(),
            "shards": self.shards,
        }  # fmt: skip


class _File:
    """A file being written, and the SHA-256 of what went into it."""

    def __init__(self, path: Path):
        self.path, self.digest = path, hashlib.sha256()
        self.file = path.open("xb")

    def write(self, data: bytes) -> None:
        self.file.write(data)
        self.digest.update(data)

    def close(self) -> dict[str, Any]:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        return {"file": self.path.name, "sha256": self.digest.hexdigest()}
