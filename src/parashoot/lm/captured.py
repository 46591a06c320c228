"""Passes over a batch as one CUDA graph: a single call queues what would else be thousands of launches, one by one.

The first passes run as they are: they compile, tune themselves, and show whether they wait for the GPU, which a graph cannot do.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Batch = list[tuple[Tensor, Tensor | None]]
"""A batch in the pieces of one pass: ids and reset, or inputs and targets, each (b, T), on the device."""

WAITED, NOTICE = "called a synchronizing CUDA operation", "Synchronization debug mode"


class Captured:
    """`compute(batch)`, captured in a CUDA graph at its third call: the batch is copied to where the graph reads, and the graph replayed.

    `compute` may change tensors that live on, such as weights, and leave new ones behind, such as gradients: those stay where they are
    from then on, as does its result, and each replay overwrites them. `clear` drops what it leaves behind. Where the second call waits
    for the GPU nothing is captured; where the pieces of a batch change in shape, it begins again.
    """

    def __init__(self, compute: Callable[[Batch], Tensor], clear: Callable[[], Any]):
        self._compute, self._clear = compute, clear
        self._layout: Any = None
        self.release()

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph."""
        return self._graph is not None

    def release(self) -> None:
        """Give the graph's memory back and begin again."""
        if self._layout is not None:
            self._clear()
        self._calls, self._waits = 0, False
        self._graph: torch.cuda.CUDAGraph | None = None
        self._batch: Batch = []
        self._result: Any = None

    def __call__(self, batch: Batch) -> Tensor:
        layout = [(v.shape, v.dtype) for v in _tensors(batch)], len(batch)
        if layout != self._layout:
            self.release()
            self._layout = layout
        if self._graph is not None:
            for place, value in zip(_tensors(self._batch), _tensors(batch), strict=True):
                place.copy_(value)
        else:
            self._calls += 1
            if self._calls == 2:
                result, self._waits = watched(lambda: self._compute(batch))
                return result
            if self._calls == 1 or self._waits:
                return self._compute(batch)
            self._capture(batch)
        assert self._graph is not None
        self._graph.replay()
        return self._result

    def _capture(self, batch: Batch) -> None:
        self._clear()
        self._batch = [(ids.clone(), None if reset is None else reset.clone()) for ids, reset in batch]
        torch.cuda.empty_cache()  # the graph has memory of its own, as much again
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._result = self._compute(self._batch)
        self._graph = graph


def _tensors(batch: Batch) -> list[Tensor]:
    return [v for piece in batch for v in piece if v is not None]


def watched(run: Callable[[], Tensor]) -> tuple[Tensor, bool]:
    """What `run` returns, and whether it waited for the GPU."""
    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            result = run()
        finally:
            torch.cuda.set_sync_debug_mode(before)
    for w in caught:
        if not any(text in str(w.message) for text in (WAITED, NOTICE)):
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
    return result, any(WAITED in str(w.message) for w in caught)
