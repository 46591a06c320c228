"""How sequences of any lengths are cut into chunks that run side by side: index arithmetic, nothing else."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Chunks:
    """B sequences, N steps in all, cut into R chunks of at most `length` steps, longest chunks first.

    Steps in chunked order stand step by step, in each all chunks that have it: PyTorch's packed format.

    - `order` (N,): where each step of the chunked order stands in the tensor of the caller; `inverse` undoes it.
    - `previous`, `following` (R,): the chunk before and after in its sequence, or R + b where sequence b begins or ends.
    - `first`, `last` (B,): the chunks at each sequence's ends. `count`: chunks of the longest sequence.
    - `grid` (length, R): place of each step in chunked order. `sizes` (R,), on the CPU: steps of each chunk.
    """

    length: int
    count: int
    sizes: Tensor
    order: Tensor
    inverse: Tensor
    previous: Tensor
    following: Tensor
    first: Tensor
    last: Tensor
    grid: Tensor

    @property
    def rows(self) -> int:
        return len(self.sizes)

    def hand_on(self, ends: Sequence[Tensor], initial: Sequence[Tensor]) -> list[Tensor]:
        """The states (R, H) that chunks start from: the end of the chunk before, or the sequence's `initial` state (B, H)."""
        return [torch.cat([e, h]).index_select(0, self.previous) for e, h in zip(ends, initial, strict=True)]

    def hand_back(self, starts: Sequence[Tensor], final: Sequence[Tensor]) -> list[Tensor]:
        """The adjoint: gradients (R, H) by chunk ends from those by chunk `starts` and by the sequences' `final` states (B, H)."""
        return [torch.cat([s, h]).index_select(0, self.following) for s, h in zip(starts, final, strict=True)]

    def batch_sizes(self, rows: Tensor | None = None) -> Tensor | None:
        """Chunks that have each step, of all or of some rows; None where all have as many."""
        sizes = self.sizes if rows is None else self.sizes[rows.cpu()]
        return None if sizes[0] == sizes[-1] else conjugate(sizes)

    def places(self, rows: Tensor) -> Tensor:
        """Where the steps of some rows stand in chunked order, themselves in chunked order."""
        sizes = self.sizes[rows.cpu()].to(rows.device)
        grid = self.grid[: int(sizes[0])].index_select(1, rows)
        if sizes[0] == sizes[-1]:
            return grid.flatten()
        return grid[torch.arange(len(grid), device=rows.device)[:, None] < sizes]


def conjugate(sizes: Tensor) -> Tensor:
    """How many of the descending `sizes` exceed t, for each t: of lengths the batch sizes, of batch sizes the lengths."""
    steps = torch.arange(int(sizes[0]))
    return len(sizes) - torch.searchsorted(sizes.flip(0), steps, right=True)


@functools.lru_cache(maxsize=16)
def cut(lengths: tuple[int, ...], length: int, time_major: bool, reverse: bool, device: torch.device) -> Chunks:
    """Chunks of `length` steps for sequences of `lengths`, which descend where `time_major`.

    The caller's tensor holds all steps in one dimension: sequence by sequence, or (`time_major`) step by step, in each all
    sequences that have it. `reverse`: each sequence runs from its last step to its first.
    """
    with torch.inference_mode(False), torch.no_grad():
        total = torch.tensor(lengths)
        counts = (total + length - 1) // length
        before = counts.cumsum(0) - counts
        sequence = torch.arange(len(lengths)).repeat_interleave(counts)
        number = torch.arange(len(sequence)) - before[sequence]
        sizes = (total[sequence] - number * length).clamp(max=length)
        descending = sizes.argsort(descending=True, stable=True)
        rank = descending.argsort()
        outside = len(sequence) + sequence
        previous = torch.where(number > 0, rank.roll(1), outside)[descending]
        following = torch.where(number + 1 < counts[sequence], rank.roll(-1), outside)[descending]
        sequence, number, sizes = sequence[descending], number[descending], sizes[descending]
        step = torch.arange(int(sizes[0]))[:, None]
        real, step = step < sizes, step + number * length
        if reverse:
            step = total[sequence] - 1 - step
        if time_major:
            present = conjugate(total)
            place = (present.cumsum(0) - present)[step.clamp(0, lengths[0] - 1)] + sequence
        else:
            place = (total.cumsum(0) - total)[sequence] + step
        order = place[real]
        grid = real.flatten().cumsum(0).view_as(place) - 1
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
        found = (order, inverse, previous, following, rank[before], rank[before + counts - 1], grid)
        return Chunks(length, int(counts.max()), sizes, *(v.to(device) for v in found))
