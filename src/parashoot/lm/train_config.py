"""How to train: everything that decides the result of a run, as one value that a checkpoint carries."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import bad_type, bad_value
from .config import ParaRNNConfig, checked_names, is_count


@dataclass
class TrainConfig:
    """One training run on bytes, with AdamW, a linear warm-up and a cosine to zero.

    - `model`: its configuration, with a vocabulary of at least 256.
    - `steps` updates of `batch_size` windows of `sequence_length` bytes.
    - `learning_rate` at its peak, reached after the fraction `warmup` of the steps.
    - `weight_decay`: on matrices only. `grad_clip`: largest norm of the whole gradient.
    - `seed` of the initial weights and of the windows.
    - `checkpoint_every` so many steps, and at the end.
    - `text`: a file to train on; None: the shipped corpus.

    Raises `ArgumentError` and `ArgumentTypeError`.
    """

    model: ParaRNNConfig
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    weight_decay: float = 0.1
    warmup: float = 0.05
    grad_clip: float = 1.0
    seed: int = 0
    checkpoint_every: int = 100
    text: str | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.model, ParaRNNConfig):
            bad_type("model", self.model, "a ParaRNNConfig")
        if self.model.vocab_size < 256:
            bad_value("model.vocab_size", str(self.model.vocab_size), "at least 256, one token for each byte")
        for name in ("steps", "batch_size", "sequence_length", "checkpoint_every"):
            if not is_count(getattr(self, name)):
                bad_value(name, repr(getattr(self, name)), "an integer >= 1")
        if self.sequence_length < 2:
            bad_value("sequence_length", str(self.sequence_length), "at least 2: a byte and the one that it predicts")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            bad_value("seed", repr(self.seed), "an integer from 0 to 2^63 - 1")
        for name, least in (("learning_rate", None), ("grad_clip", None), ("weight_decay", 0.0), ("warmup", 0.0)):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (least is None and value == 0):
                bad_value(name, repr(value), "a finite number > 0" if least is None else "a finite number >= 0")
        if self.warmup > 1:
            bad_value("warmup", repr(self.warmup), "a fraction of the steps, at most 1")
        if self.text is not None and not isinstance(self.text, str):
            bad_type("text", self.text, "None or the path of a file")

    def learning_rate_at(self, step: int) -> float:
        """The rate of update `step` = 0, 1, ...: linear to `learning_rate`, then half a cosine, zero after the last one."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {**asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The configuration that `to_dict` gave. Raises `ArgumentError` for unknown or missing names."""
        values = dict(checked_names(cls, values))
        if isinstance(values["model"], dict):
            values["model"] = ParaRNNConfig.from_dict(values["model"])
        return cls(**values)
