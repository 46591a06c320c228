"""How well a model predicts a split: over all of it with the state carried along, and by how much of the past it has seen."""

from __future__ import annotations

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import bad_value
from .cache import Cache
from .data import Tokens


@dataclass(frozen=True)
class Evaluation:
    """`nats` over `scored` tokens, which stand for `bytes` of text; `by_position`: for each range [first, last) of tokens
    since the stream or the document began, how many were scored and their nats."""

    nats: float
    scored: int
    bytes: float
    by_position: list[tuple[int, int, int, float]]

    @property
    def loss(self) -> float:
        """Mean of -ln p over the tokens."""
        return self.nats / self.scored

    @property
    def perplexity(self) -> float:
        return perplexity(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.nats / math.log(2) / self.bytes

    def to_dict(self) -> dict[str, Any]:
        """All figures."""
        return {
            **asdict(self), "loss": self.loss, "perplexity": self.perplexity, "bits_per_byte": self.bits_per_byte
        }  # fmt: skip


def perplexity(loss: float) -> float:
    """exp(loss), infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


@torch.no_grad()
def evaluate(
    model: Any,
    tokens: Tokens,
    *,
    stream: int | None = None,
    batch: int = 8,
    window: int = 1024,
    context: int | None = None,
    lower: AbstractContextManager[Any] | None = None,
) -> Evaluation:
    """-ln p of every token of `tokens` but the first, each scored once, given what comes before it in its stream.

    The split is cut into streams of `stream` tokens (None: as many as fill one batch); `batch` of them run side by side, from an
    empty state, in windows of `window` tokens between which the state is carried. Documents begin from an empty state.
    A Transformer instead reads each window together with the `context` tokens before it (None: as many as a window).
    `lower`: a context for the passes, such as autocast. Raises `ArgumentError`.
    """
    grows = model.config.cache_grows
    if context is not None and not (grows and context >= 0):
        expected = "None or an integer >= 0" if grows else "None"
        bad_value("context", str(context), expected, "" if grows else "This model carries all of its past as a state.")
    context = (window if context is None else context) if grows else 0
    predicted = len(tokens) - 1
    stream = min(stream or math.ceil(predicted / batch), predicted)
    heads = np.arange(0, predicted, stream)
    device, was_training = next(model.parameters()).device, model.training
    buckets = torch.zeros(2, 64, dtype=torch.float64)
    model.eval()
    with lower or nullcontext():
        for group in np.split(heads, range(batch, len(heads), batch)):
            past, since = None if grows else Cache(), torch.zeros(len(group), 1, dtype=torch.int64)
            for at in range(0, stream, window):
                length, before = min(window, stream - at), min(context, at)
                ids, reset, valid = _rows(tokens, group + at - before, before + length)
                documents = reset.to(device) if len(tokens.starts) > 1 else None
                ids = ids.to(device)
                loss = model.token_losses(ids[:, :-1], ids[:, before + 1 :], past, documents).double().cpu()
                seen = _since(reset[:, before:], since)
                since = seen[:, -1:]
                _add(buckets, seen[valid[:, before:]], loss[valid[:, before:]])
    model.train(was_training)
    scored, nats = int(buckets[0].sum()), float(buckets[1].sum())
    ranges = [
        (1 << k, 2 << k, int(n), float(v)) for k, (n, v) in enumerate(buckets.T.tolist()) if n
    ]  # fmt: skip
    return Evaluation(nats, scored, tokens.bytes * scored / len(tokens), ranges)


def _rows(tokens: Tokens, starts: np.ndarray, length: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids (B, length + 1), reset (B, length) and which targets are real (B, length): the last stream may end early."""
    ids, reset = np.zeros((len(starts), length + 1), np.int64), np.zeros((len(starts), length), bool)
    valid = np.zeros_like(reset)
    for k, start in enumerate(starts):
        found = tokens.read(start, min(start + length + 1, len(tokens)))
        real = max(len(found) - 1, 0)
        ids[k, : len(found)], valid[k, :real] = found, True
        reset[k, :real] = tokens.resets(start, start + real)
    return torch.from_numpy(ids), torch.from_numpy(reset), torch.from_numpy(valid)


def _since(reset: Tensor, before: Tensor) -> Tensor:
    """How many tokens of its document, or of its stream, the model has read at each step: reset (B, T), before (B, 1) -> (B, T)."""
    at = torch.arange(1, reset.shape[1] + 1).expand(reset.shape)
    begun = torch.where(reset, at - 1, -before).cummax(1).values
    return at - begun


def _add(buckets: Tensor, seen: Tensor, nats: Tensor) -> None:
    """Add losses to the bucket floor(log2 seen): counts in the first row, nats in the second."""
    place = torch.frexp(seen.double()).exponent.long() - 1
    buckets[0].index_add_(0, place, torch.ones_like(nats))
    buckets[1].index_add_(0, place, nats)
