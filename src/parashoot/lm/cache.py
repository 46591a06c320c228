"""What a model keeps of the past while it generates: the same size whatever the length, unless attention mixes the tokens."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class Cache:
    """The past of B sequences: `blocks`, for each block the tensors that its mixer keeps, the batch in front.

    A model called with it continues from it and leaves the new past in it. `length`: tokens seen. Empty, it is the past of
    a sequence that begins.
    """

    blocks: list[tuple[Tensor, ...]] = field(default_factory=list)
    length: int = 0

    # What transformers asks: no layers of its own kind, no compiling of its own, no going back.
    is_linear, is_compileable, is_croppable = (False,), False, False

    @property
    def batch_size(self) -> int | None:
        """B, None while empty."""
        return self.blocks[0][0].shape[0] if self.blocks else None

    def detach(self) -> Cache:
        """The same past, through which no gradient flows."""
        return Cache([tuple(t.detach() for t in block) for block in self.blocks], self.length)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take the rows `beam_idx` (B,) of the batch, as beam search does."""
        self.blocks = [tuple(t.index_select(0, beam_idx.to(t.device)) for t in block) for block in self.blocks]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """`length`, under the name that transformers calls."""
        return self.length


def boundaries(attention_mask: Tensor, time: int) -> Tensor:
    """Where the last `time` tokens of a mask (B, >= T) turn from padding to text: (B, T) bool, a reset at each."""
    real = attention_mask.to(torch.bool)
    before = torch.cat([real[:, :1], real[:, :-1]], 1)
    return (real & ~before)[:, real.shape[1] - time :]
