"""Bits per byte of a text, with the state carried through it."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache import Cache
from .model import ParaRNNForCausalLM


@torch.no_grad()
def bits_per_byte(model: ParaRNNForCausalLM, data: Tensor, *, streams: int = 32, window: int = 512) -> float:
    """Mean of -log2 p(byte | what comes before it in its stream) over every byte of `data` (N,) uint8 but the first.

    The text is read as `streams` parallel pieces, each from an empty state, its own windows with the state carried over.
    """
    predicted = data.shape[0] - 1
    streams = min(streams, predicted)
    length = math.ceil(predicted / streams)
    rows = data.new_zeros(streams * length + 1, dtype=torch.int64)
    rows[: data.shape[0]] = data
    targets = rows.new_full((streams * length,), -100)
    targets[:predicted] = data[1:]
    inputs, targets = rows[:-1].view(streams, length), targets.view(streams, length)
    device, was_training = next(model.parameters()).device, model.training
    model.eval()
    nats, cache = 0.0, Cache()
    for start in range(0, length, window):
        part = slice(start, start + window)
        out = model(inputs[:, part].to(device), past_key_values=cache)
        losses = F.cross_entropy(
            out.logits.flatten(0, 1).float(), targets[:, part].flatten().to(device), reduction="sum"
        )
        nats += float(losses)
    model.train(was_training)
    return nats / predicted / math.log(2)
