"""A results file: one JSON object a line, only appended to, by several processes if need be.

A line that a kill cut off is left out when the file is read, and goes to a file beside it when a row is added. What is no such
file is left alone.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..errors import bad_value
from ..lock import lock

Row = dict[str, Any]


def read_rows(path: Path, argument: str, command: str, key: str, add: Callable[[Row], Any]) -> None:
    """Give each row of `path`, which `command` wrote, to `add`; `key` is a row's first. Raises `ArgumentError`, of an `add` that fails too."""
    if not path.is_file():
        bad_value(argument, f"'{path}'", "an existing results file", f"Write one with: {command} --out FILE")
    try:
        *whole, last = path.read_bytes().split(b"\n")
        lines = [*(line.decode() for line in whole), _decoded(last)]
    except UnicodeDecodeError as e:
        bad_value(argument, f"'{path}', which is not text ({e.reason})", f"a file of rows as {command} writes them")
    for number, line in enumerate(lines, 1):
        if not line or (number == len(lines) and _torn(line, key)):
            continue
        try:
            add(json.loads(line))
        except (ValueError, KeyError, TypeError, AttributeError) as e:
            what = f"'{path}', line {number}: {type(e).__name__}: {e}"
            bad_value(argument, what, f"a row as {command} writes it in each line")


def open_rows(path: Path, argument: str) -> None:
    """See, before any work, that rows can be added to `path`. Raises `ArgumentError`."""
    if path.is_dir() or path.suffix == ".png":
        kind = "a directory" if path.is_dir() else "where a plot would go"
        bad_value(argument, f"'{path}', {kind}", "a file for rows, such as results.jsonl")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") if path.exists() else tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as e:
        bad_value(argument, f"'{path}' ({e.strerror})", "a file that can be written", "Choose another.")


def add_rows(path: Path, rows: Sequence[Row]) -> None:
    """Append rows at once, as other processes may."""
    with path.open("a+b") as file:
        lock(file.fileno())
        file.seek(0)
        text = file.read()
        tail = text[text.rfind(b"\n") + 1 :]
        start = b"\n" if tail else b""
        if tail and rows and _torn(_decoded(tail), next(iter(rows[0]))):
            with path.with_name(f"{path.name}.cut").open("ab") as cut:
                cut.write(tail + b"\n")
            file.truncate(len(text) - len(tail))
            start = b""
        file.write(start + b"".join(json.dumps(row).encode() + b"\n" for row in rows))


def _decoded(tail: bytes) -> str:
    """The last line, which may end inside a character, or in zeros where the power went."""
    return tail.rstrip(b"\0").decode(errors="replace")


def _torn(line: str, key: str) -> bool:
    """Whether it is the beginning of a row, and no more."""
    head = f'{{"{key}"'
    try:
        json.JSONDecoder().raw_decode(line)
    except ValueError:
        return line.startswith(head) or head.startswith(line)
    return False
