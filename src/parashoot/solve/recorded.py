"""The planned course of a solve over chunks, recorded once as CUDA graphs: a short step costs the host more than the device.

One graph holds the forward passes, one the backward passes; what follows the look at their defects is not recorded, and a course that
does not settle is run again without graphs. A recording keeps the memory of one call, and serves one call at a time.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .black_box import Course, Return, Task, back, backward, course, gradients, judge, judge_back, once, outcome

MISSES = 8  # calls in a row with other parameters, needs or stream, before it is given up
RENEW = 8192  # passes after which a recording is made again, by what the plan knows then
Weights = Callable[[Tensor], list[Tensor]]  # those of the moment, for inputs like the one given


class Graph:
    """`run`, which returns tensors of its own, as a CUDA graph: `replay` computes what `found` holds again."""

    def __init__(self, run: Callable[[], Any], stream: torch.cuda.Stream, pool: Any = None):
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph, pool=pool, stream=stream, capture_error_mode="thread_local"):
            self.found = run()

    def replay(self) -> None:
        self.graph.replay()

    @property
    def pool(self) -> Any:
        return self.graph.pool()


def current(device: torch.device) -> torch.cuda.Stream:
    """The stream that work goes to."""
    return torch.cuda.current_stream(device)


def warm(run: Callable[[], None], device: torch.device) -> torch.cuda.Stream:
    """A new stream, on which `run` has run."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(current(device))
    with torch.cuda.stream(stream):
        run()
    current(device).wait_stream(stream)
    return stream


class Recorded:
    """A task's planned course for tensors like those given, with weights made by `weights` from the parameters of the moment.

    `run` answers for the task, or not at all (None): while an earlier call waits for its backward pass, for other parameters or needs
    than those recorded, and where the planned passes did not suffice (`failed`).
    """

    def __init__(
        self, task: Task, x: Tensor, initial: Sequence[Tensor], weights: Weights, raw: Sequence[Tensor]
    ):  # fmt: skip
        self.task, self.turn, self.missed, self.failed = task, 0, 0, False
        self.needed, self.addresses = _needed(x, initial, raw), [w.data_ptr() for w in raw]
        self.waiting: weakref.ref[_Call] | None = None
        with torch.inference_mode(False), torch.no_grad():
            self.inner = x.detach().index_select(0, task.chunks.order)
            self.initial = [v.detach().clone() for v in initial]
            self.dy, self.d_final = self.inner, [torch.zeros_like(v) for v in self.initial]
            self.here, self.behind = current(x.device), None
            try:
                stream = warm(lambda: self._once(weights), x.device)
                self.ahead = Graph(lambda: self._ahead(weights), stream)
                if self.needed:
                    self.behind = Graph(lambda: self._back(self.ahead.found), stream, self.ahead.pool)
            except RuntimeError:  # no memory left, or a library that does not let itself be recorded: run without
                self.failed = True

    def _once(self, weights: Weights) -> None:
        """All that will be recorded: cuDNN makes what it needs on a stream in a first call there."""
        came = self._ahead(weights)
        if self.needed:
            self.dy = torch.zeros_like(torch.cat(list(came.run.ys)))
            self._back(came)

    @property
    def usable(self) -> bool:
        """Whether it settles, and is not so old that another plan may be better."""
        return not self.failed and self.turn < RENEW

    def _ahead(self, weights: Weights) -> Course:
        return course(self.task, self.inner, self.initial, weights(self.inner), self.needed)

    def _back(self, came: Course) -> Return:
        return back(self.task, self.task.chunks, came.run, self.dy, self.d_final, None, self.task.planned_back)

    def run(
        self, x: Tensor, initial: Sequence[Tensor], weights: Weights, raw: Sequence[Tensor]
    ) -> tuple[Tensor, list[Tensor]] | None:
        """As `solve`: outputs (N, H) in the order of x, final states (B, H); None: not this time."""
        call = self.waiting and self.waiting()
        if self.failed or (call and not call.done):
            return None
        same = self.addresses == [w.data_ptr() for w in raw] and self.needed == _needed(x, initial, raw)
        self.missed = 0 if same and current(x.device) == self.here else self.missed + 1
        self.failed = self.missed > MISSES
        if self.missed:
            return None
        self.turn += 1
        with torch.no_grad():
            torch.index_select(x.detach().to(self.inner.dtype), 0, self.task.chunks.order, out=self.inner)
            for mine, given in zip(self.initial, initial, strict=True):
                mine.copy_(given)
            self.ahead.replay()
            found = self.ahead.found
            settled = judge(self.task, found.begun, found.moved, self.inner.dtype)[0]
        if not settled:
            self.failed = math.isfinite(self.task.record.defect)  # else it is the numbers that failed
            return None
        self.task.record.recorded = True
        if not self.needed:
            return outcome(self.task.chunks, found.run)
        y, *final = _Replay.apply(self, weights, len(initial), x, *initial, *raw)  # type: ignore[misc]
        return y, final

    def backward(self, turn: int, dy: Tensor, d_final: Sequence[Tensor]) -> list[Tensor | None] | None:
        """Gradients of the call that had this turn, by compute dtype; None where its graph is gone or did not settle."""
        if turn != self.turn or self.behind is None:
            return None
        task, chunks = self.task, self.task.chunks
        torch.index_select(dy, 0, chunks.order, out=self.dy)
        for mine, given in zip(self.d_final, d_final, strict=True):
            mine.copy_(given)
        self.turn += 1
        self.behind.replay()
        settled, _, defect = judge_back(task, chunks, self.behind.found, task.planned_back, self.inner.dtype)
        task.record.backward_passes = task.planned_back
        self.failed = not settled and math.isfinite(defect)
        return gradients(chunks, self.behind.found, self.needed or ()) if settled else None


class _Call:
    """A forward pass whose backward pass may still come."""

    done = False


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(ctx, recorded: Recorded, weights: Weights, states: int, x: Tensor, *tensors: Tensor):  # type: ignore[override]
        ctx.save_for_backward(x, *tensors)
        found = recorded.ahead.found
        ctx.recorded, ctx.weights, ctx.states, ctx.turn, ctx.call = recorded, weights, states, recorded.turn, _Call()
        ctx.starts = [v.detach().clone() for v in found.starts]
        recorded.waiting = weakref.ref(ctx.call)
        y, final = outcome(recorded.task.chunks, found.run)
        return y, *final

    @staticmethod
    def backward(ctx, dy: Tensor, *d_final: Tensor):  # type: ignore[override]
        recorded, (x, *tensors), states = ctx.recorded, ctx.saved_tensors, ctx.states
        dy, by_final = dy.detach(), [v.detach() for v in d_final]
        with torch.no_grad():
            found, ctx.call.done = recorded.backward(ctx.turn, dy, by_final), True
            if found is None:
                task, given = recorded.task, [v.detach().to(dy.dtype) for v in (x, *tensors[:states])]
                found = backward(
                    task, task.chunks, None, given[0], ctx.starts, given[1:], ctx.weights(given[0]), dy, by_final, recorded.needed
                )  # fmt: skip
            grads: Sequence[Tensor | None] = [  # copies: those by weights lie in the recording
                g if g is None else g.to(v.dtype, copy=True) for g, v in zip(found, (x, *tensors), strict=True)
            ]
        if torch.is_grad_enabled():
            grads = once(grads, dy, *d_final, x, *tensors)
        return None, None, None, *grads


def _needed(x: Tensor, initial: Sequence[Tensor], raw: Sequence[Tensor]) -> tuple[bool, ...] | None:
    needed = tuple(v.requires_grad for v in (x, *initial, *raw))
    return needed if torch.is_grad_enabled() and any(needed) else None


class Own(dict[Any, Any]):
    """What is not copied with the module that holds it."""

    def __reduce__(self) -> tuple[type, tuple]:
        return type(self), ()
