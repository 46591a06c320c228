"""One step of a trial: its batch, and its update."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..lm.captured import Batch, Captured
from ..lm.order import Permutation
from .suite import Trial
from .task import IGNORED, METRICS, Samples, tally

TOGETHER = 32  # batches drawn in one go


class Update:
    """A step of AdamW on a batch: forward, backward, the gradient's norm clipped to 1; on a GPU one CUDA graph."""

    def __init__(self, model: Any, trial: Trial, device: torch.device):
        self._model, gpu = model, device.type == "cuda"
        self._rate = torch.zeros((), device=device)  # which a graph reads where it is
        self._optimizer = torch.optim.AdamW(
            model.parameters(), lr=self._rate, weight_decay=trial.weight_decay, fused=True, capturable=gpu
        )
        self._run = Captured(self._step, self._optimizer.zero_grad) if gpu else self._step

    def __call__(self, x: Tensor, y: Tensor, rate: float) -> tuple[Tensor, Tensor]:
        """The loss, and the share of sequences whose last answer was right, before a step at this rate on inputs and targets (B, T)."""
        self._rate.fill_(rate)
        loss, last = self._run([(x, y)]).clone()
        return loss, last

    def _step(self, batch: Batch) -> Tensor:
        ((x, y),) = batch
        assert y is not None
        logits = self._model(input_ids=x).logits
        asked = (y != IGNORED).sum().clamp(min=1)  # of a batch that asks nothing nothing is learnt
        loss = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="sum") / asked
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._model.parameters(), 1.0)
        self._optimizer.step()
        right, last = tally(logits.detach().argmax(-1), y)[METRICS.index("last")]
        return torch.stack([loss.detach(), right / last.clamp(min=1)])


class Batches:
    """The batches of a trial by step: of new samples, or of its fixed ones in the order of the epoch; drawn and sent many at a time."""

    def __init__(self, trial: Trial, device: torch.device):
        self._trial, self._device = trial, device
        self._key: Any = None
        self._pieces: Sequence[tuple[Tensor, Tensor]] = ()
        self._fixed: Any = None

    def __call__(self, data: Samples, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets (B, T) of step 0, 1, ..., of `data`."""
        size, count = self._trial.batch_size, self._trial.train_samples
        many = TOGETHER if count is None else count // size
        part, at = divmod(step, many)
        if (data, part) != self._key:
            self._key = data, part
            x, y = (v.split(size) for v in self._drawn(data, part, many * size))
            self._pieces = list(zip(x, y, strict=True))
        return self._pieces[at]

    def _drawn(self, data: Samples, part: int, samples: int) -> list[Tensor]:
        trial = self._trial
        if trial.train_samples is None:
            return [v.to(self._device) for v in data.batch(part * samples, samples)]
        if self._fixed is None:
            self._fixed = [v.to(self._device) for v in data.batch(0, trial.train_samples)]
        chosen = Permutation(trial.train_samples, trial.seed + (part << 32))(torch.arange(samples).numpy())
        return [v[torch.from_numpy(chosen).to(self._device)] for v in self._fixed]
