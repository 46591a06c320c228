"""Text as bytes: the shipped corpus or a file, its training and validation parts, and random windows of it."""

from __future__ import annotations

import lzma
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import bad_value

CORPUS = "sotu.txt.xz"
VALIDATION = 0.05


def load_text(path: str | Path | None = None) -> bytes:
    """The bytes of the file at `path`, or the shipped corpus: addresses of the US presidents since 1893.

    Raises `ArgumentError` if the file is missing, a directory, or empty.
    """
    if path is None:
        return lzma.decompress((resources.files("parashoot.lm") / "assets" / CORPUS).read_bytes())
    if not Path(path).is_file():
        bad_value("text", f"'{path}'", "an existing file of text", "Leave it out to use the shipped corpus.")
    text = Path(path).read_bytes()
    if not text:
        bad_value("text", f"the empty file '{path}'", "a file of text")
    return text


def split(text: bytes, window: int) -> tuple[Tensor, Tensor]:
    """The first 95% for training and the last 5% for validation, uint8; each must hold a `window` of bytes.

    Raises `ArgumentError` if the text is too short for that.
    """
    at = round(len(text) * (1 - VALIDATION))
    if min(at, len(text) - at) < window:
        need = round(window / VALIDATION)
        bad_value(
            "text", f"{len(text):,} bytes", f"at least {need:,}: 5% for validation must hold a window of {window} bytes"
        )
    data = torch.frombuffer(bytearray(text), dtype=torch.uint8)
    return data[:at], data[at:]


class Windows:
    """Random windows of a text, drawn from a seeded generator whose state can be saved and set.

    data (N,) uint8 -> batches (B, T) int64, on the CPU.
    """

    def __init__(self, data: Tensor, batch_size: int, length: int, seed: int):
        self.data, self.batch_size, self.length = data, batch_size, length
        self.generator = torch.Generator().manual_seed(seed)

    def draw(self) -> Tensor:
        """The next batch (B, T)."""
        last = self.data.shape[0] - self.length
        starts = torch.randint(0, last + 1, (self.batch_size, 1), generator=self.generator)
        return self.data[starts + torch.arange(self.length)].long()

    def state_dict(self) -> dict[str, Any]:
        """Where the generator stands."""
        return {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was taken."""
        self.generator.set_state(state["generator"])
