"""What a model keeps of the past while it generates: the same size whatever the length."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Cache:
    """The past of B sequences, for each block: `conv` (B, k - 1, C), the last inputs of its convolution, and `state` (1, B, S, C).

    A model called with it continues from it and leaves the new past in it. `length`: tokens seen. Empty, it is the past of
    a sequence that begins.
    """

    conv: list[Tensor] = field(default_factory=list)
    state: list[Tensor] = field(default_factory=list)
    length: int = 0

    # What transformers asks: no entry for each token, no compiling of its own, no going back.
    is_linear, is_compileable, is_croppable = (True,), False, False

    @property
    def batch_size(self) -> int | None:
        """B, None while empty."""
        return self.state[0].shape[1] if self.state else None

    def detach(self) -> Cache:
        """The same past, through which no gradient flows."""
        return Cache([t.detach() for t in self.conv], [t.detach() for t in self.state], self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` (B,) of the batch, as beam search does."""
        self.conv = [t.index_select(0, beam_idx.to(t.device)) for t in self.conv]
        self.state = [t.index_select(1, beam_idx.to(t.device)) for t in self.state]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """`length`, under the name that transformers calls."""
        return self.length

    def past(self, block: int) -> tuple[Tensor | None, Tensor | None]:
        """`conv` and `state` of a block, None while empty."""
        return (self.conv[block], self.state[block]) if self.state else (None, None)

    def store(self, past: list[tuple[Tensor, Tensor]], tokens: int) -> None:
        """Hold (`conv`, `state`) of every block after `tokens` further ones."""
        self.conv, self.state = [conv for conv, _ in past], [state for _, state in past]
        self.length += tokens


def boundaries(attention_mask: Tensor, time: int) -> Tensor:
    """Where the last `time` tokens of a mask (B, >= T) turn from padding to text: (B, T) bool, a reset at each."""
    real = attention_mask.to(torch.bool)
    before = torch.cat([real[:, :1], real[:, :-1]], 1)
    return (real & ~before)[:, real.shape[1] - time :]
