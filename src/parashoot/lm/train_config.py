"""How to train: everything that decides the result of a run, as one value that a checkpoint carries."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import bad_type, bad_value
from .config import ParaRNNConfig, checked_names, is_count
from .models import model_config

COUNTS = ("steps", "batch_size", "sequence_length", "checkpoint_every", "keep_checkpoints", "statistics_every")
SWITCHES = ("compile", "cuda_graph", "activation_checkpointing", "tensorboard")
FREE = ("data", "micro_batch_size", "checkpoint_every", "keep_checkpoints", "statistics_every", *SWITCHES)
"""Fields that a resumed run may change: they say where and how it computes, not what."""


@dataclass
class TrainConfig:
    """One training run: AdamW with betas (0.9, 0.95), a linear warm-up and a cosine to zero.

    - `model`: its configuration; in JSON an object with `model_type` ("pararnn" if left out), or the name of a preset.
    - `steps` updates of `batch_size` windows of `sequence_length` tokens, over all processes together.
    - `learning_rate` at its peak, reached after the fraction `warmup` of the steps.
    - `weight_decay`: on matrices only, decoupled from the learning rate: w <- (1 - weight_decay * rate / peak rate) w.
    - `z_loss`: weight of the mean of (ln sum exp logits)^2. `grad_clip`: largest norm of the whole gradient.
    - `seed` of the initial weights and of the order of the windows.
    - `precision`: "bf16" (weights, gradient sums and optimizer in float32), "fp32"; None: bf16 on a GPU, fp32 on a CPU.
    - `data`: a directory written by `parashoot data`; None: the shipped corpus.
    - `micro_batch_size`: windows that a process takes at a time, gradients accumulated; None: its whole share.
    - `compile` each block. `cuda_graph`: on one GPU, from the third step on, passes are replayed from a CUDA graph, with the same result
      and without hooks on modules; not where they wait for the GPU, nor with activation checkpointing.
    - `activation_checkpointing`: keep only the blocks' inputs for backward.
    - `checkpoint_every` so many steps, and at the end; the last `keep_checkpoints` stay.
    - `statistics_every` so many steps, log how the recurrent layers were solved. `tensorboard`: write its logs too.

    Raises `ArgumentError` and `ArgumentTypeError`. Source of the recipe: Danieli et al. 2025 (ParaRNN, arXiv 2510.21450).
    """

    model: ParaRNNConfig
    steps: int
    batch_size: int
    sequence_length: int
    learning_rate: float
    weight_decay: float = 1e-4
    warmup: float = 0.1
    z_loss: float = 1e-4
    grad_clip: float = 1.0
    seed: int = 0
    precision: str | None = None
    data: str | None = None
    micro_batch_size: int | None = None
    compile: bool = False
    cuda_graph: bool = True
    activation_checkpointing: bool = False
    checkpoint_every: int = 100
    keep_checkpoints: int = 2
    statistics_every: int = 100
    tensorboard: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.model, ParaRNNConfig):
            bad_type("model", self.model, "the configuration of a model")
        if self.model.z_loss:
            bad_value("model.z_loss", repr(self.model.z_loss), "0", "The z_loss of the training decides.")
        for name in COUNTS:
            if not is_count(getattr(self, name)):
                bad_value(name, repr(getattr(self, name)), "an integer >= 1")
        if self.micro_batch_size is not None and not is_count(self.micro_batch_size):
            bad_value("micro_batch_size", repr(self.micro_batch_size), "None or an integer >= 1")
        if self.sequence_length < 2:
            bad_value("sequence_length", str(self.sequence_length), "at least 2: a token and the one that it predicts")
        if isinstance(self.seed, bool) or not isinstance(self.seed, int) or not 0 <= self.seed < 2**63:
            bad_value("seed", repr(self.seed), "an integer from 0 to 2^63 - 1")
        positive = ("learning_rate", "grad_clip")
        for name in (*positive, "weight_decay", "warmup", "z_loss"):
            value = getattr(self, name)
            number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
            if not number or value < 0 or (name in positive and value == 0):
                bad_value(name, repr(value), f"a finite number {'>' if name in positive else '>='} 0")
        if self.warmup > 1:
            bad_value("warmup", repr(self.warmup), "a fraction of the steps, at most 1")
        if self.weight_decay > 1:
            bad_value(
                "weight_decay", repr(self.weight_decay), "at most 1, which leaves nothing of a weight at the peak rate"
            )
        for name in SWITCHES:
            if not isinstance(getattr(self, name), bool):
                bad_type(name, getattr(self, name), "true or false")
        if self.precision not in (None, "bf16", "fp32"):
            bad_value("precision", repr(self.precision), "'bf16', 'fp32' or None")
        if self.data is not None and not isinstance(self.data, str):
            bad_type("data", self.data, "None or the path of a directory")

    def learning_rate_at(self, step: int) -> float:
        """The rate of update `step` = 0, 1, ...: linear to `learning_rate`, then half a cosine, zero after the last one."""
        warm = max(1, round(self.warmup * self.steps))
        if step < warm:
            return self.learning_rate * (step + 1) / warm
        return self.learning_rate * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm)))

    def micro_batch(self, ranks: int) -> int:
        """Windows of one pass on each of `ranks` processes. Raises `ArgumentError` if the batch does not divide."""
        share, rest = divmod(self.batch_size, ranks)
        if rest:
            bad_value("batch_size", str(self.batch_size), f"a multiple of the {ranks} processes")
        micro = share if self.micro_batch_size is None else self.micro_batch_size
        if share % micro:
            bad_value(
                "micro_batch_size", str(micro), f"a divisor of the {share} windows that each process takes a step"
            )
        return micro

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain values."""
        return {**asdict(self), "model": self.model.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> TrainConfig:
        """The configuration that `to_dict` gave. Raises `ArgumentError` for unknown or missing names."""
        values = dict(checked_names(cls, values))
        if not isinstance(values["model"], ParaRNNConfig):
            values["model"] = model_config(values["model"])
        return cls(**values)
