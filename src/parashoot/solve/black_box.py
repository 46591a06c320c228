"""Multiple shooting with the zero Jacobian, around a recurrence that is a black box: one that only runs and is differentiated.

Chunks are extra batch. Forward: s_{c+1} <- e_c(s_c) until no start moves; after k passes the first k chunks are exact.
Backward, the same for the gradients that cross chunk boundaries: dL/de_c <- dL/ds_{c+1}, by the recurrence's own backward.
Weight gradients come from the last pass alone. Source: the parareal iteration (Lions, Maday, Turinici 2001) without its coarse solver.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConvergenceError, GradientError
from .chunks import Chunks
from .settle import grew, is_settled, moves, noise, passes_left, read, relative_moves

# (steps (N, D) in chunked order, batch sizes or None, starts, weights) -> (outputs (N, H), ends); differentiable where gradients are on.
Shoot = Callable[[Tensor, Tensor | None, Sequence[Tensor], Sequence[Tensor]], tuple[Tensor, Sequence[Tensor]]]


@dataclass
class Record:
    """How a recurrence was solved last, and how many steps it takes to forget: what a plan for the next call is made from.

    `passes` and `backward_passes` over the chunks, the last `defect`; `chunk_length` 0 where it ran plainly; `recorded`: as CUDA graphs.
    """

    chunk_length: int = 0
    passes: int = 1
    backward_passes: int = 1
    defect: float = 0.0
    recorded: bool = False
    horizons: list[float] = field(default_factory=lambda: [32.0, 32.0])  # steps to forget: forward, backward
    least: list[float] = field(
        default_factory=lambda: [0.0, 0.0]
    )  # the horizon when last it could be told from rounding
    rest: int = 0  # plain calls before the next attempt
    wait: int = 32  # `rest` after the next failure

    def horizon(self) -> tuple[int, int]:
        """Steps, forward and backward."""
        return math.ceil(self.horizons[0]), math.ceil(self.horizons[1])

    def learn(self, way: int, horizon: float, exact: bool) -> None:
        """Forward (0) or backward (1) took that many steps to forget, or no more than that: up at once, down slowly."""
        if exact and math.isfinite(horizon):
            self.horizons[way] = self.least[way] = max(horizon, 0.9 * self.horizons[way])
        elif not exact:
            self.least[way] *= 0.995
            self.horizons[way] = max(0.9 * self.horizons[way], self.least[way])

    def plainly(self) -> None:
        """It ran as one chunk a sequence."""
        self.chunk_length, self.passes, self.backward_passes, self.defect, self.recorded = 0, 1, 1, 0.0, False

    def give_up(self) -> None:
        """Chunks did not pay: leave them for a while, each time for longer."""
        self.rest, self.wait = self.wait, min(2 * self.wait, 1024)

    def rested(self, time: int) -> bool:
        """Whether this call still rests; after the last of them, chunks get another chance at sequences of `time` steps."""
        if self.rest == 0:
            return False
        self.rest -= 1
        if self.rest == 0:
            self.horizons = [min(h, time / 8) for h in self.horizons]
        return True


@dataclass(frozen=True, eq=False)
class Task:
    """One run of `shoot`: `chunks`, or `whole` sequences instead once more than `affordable` further passes are needed.

    `tol` bounds what a start may still move, relative to max(1, |state|), and a gradient, relative to the largest;
    `passes` (forward, backward) are made before looking; `limit`: passes allowed. The first pass is a guess: forward over the last
    `lead` steps of each chunk, backward over the first, all of them but where chunks are of one length.
    """

    shoot: Shoot
    chunks: Chunks
    whole: Callable[[], Chunks]
    tol: float
    lead: int
    passes: tuple[int, int]
    affordable: float
    limit: int | None
    record: Record

    def guess(self, chunks: Chunks) -> int:
        """Steps of a chunk that the first pass takes."""
        split = chunks.count > 1 and chunks.batch_sizes() is None
        return min(self.lead, chunks.length) if split else chunks.length

    def exact(self, chunks: Chunks) -> int:
        """Passes after which no chunk can be wrong: each makes one more right, but for a guess."""
        return chunks.count + (self.guess(chunks) < chunks.length)

    @property
    def planned(self) -> int:
        """Forward passes made before looking."""
        exact = self.exact(self.chunks)
        return min(self.passes[0], exact, self.limit or exact)

    @property
    def planned_back(self) -> int:
        """Backward passes made before looking."""
        return min(self.passes[1], self.exact(self.chunks))


class Run(NamedTuple):
    """A pass over all chunks: its inputs, as leaves of a graph where gradients are on, and what came: outputs up to the states
    `middle` and after them, and `ends`. `middle` is `ends` where the pass was made in one piece."""

    x: Tensor
    starts: Sequence[Tensor]
    weights: Sequence[Tensor]
    ys: Sequence[Tensor]
    middle: Sequence[Tensor]
    ends: Sequence[Tensor]


def solve(task: Task, x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Run all sequences: x (N, D), `initial` states (B, H) -> outputs (N, H) in the order of x, final states (B, H).

    Raises `ConvergenceError` at the task's limit, `GradientError` when differentiated twice.
    """
    if torch.is_grad_enabled() and any(v.requires_grad for v in (x, *initial, *weights)):
        y, *final = _Solve.apply(task, len(initial), x, *initial, *weights)  # type: ignore[misc]
        return y, final
    return outcome(*forward(task, x, initial, weights, None))


def outcome(chunks: Chunks, run: Run) -> tuple[Tensor, list[Tensor]]:
    """Outputs in the caller's order of steps, final states."""
    y = torch.cat([v.detach() for v in run.ys]) if len(run.ys) > 1 else run.ys[0].detach()
    return y.index_select(0, chunks.inverse), [e.detach().index_select(0, chunks.last) for e in run.ends]


class _Solve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, task: Task, states: int, x: Tensor, *tensors: Tensor):  # type: ignore[override]
        needed = ctx.needs_input_grad[2:]
        # Whoever intercepts what is saved (checkpointing, offloading) wants no graph kept: then backward makes its own.
        keep = torch._C._autograd._top_saved_tensors_default_hooks(False) is None  # type: ignore[attr-defined]
        ctx.save_for_backward(x, *tensors)
        chunks, run = forward(task, x, tensors[:states], tensors[states:], needed if keep else None)
        ctx.task, ctx.chunks, ctx.states = task, chunks, states
        ctx.starts, ctx.run = [v.detach() for v in run.starts], run if keep else None
        y, final = outcome(chunks, run)
        return y, *final

    @staticmethod
    def backward(ctx, dy: Tensor, *d_final: Tensor):  # type: ignore[override]
        x, *tensors = saved = ctx.saved_tensors
        run, ctx.run = ctx.run, None
        with torch.no_grad():
            grads = backward(
                ctx.task, ctx.chunks, run, x.detach(), ctx.starts, tensors[: ctx.states], tensors[ctx.states :],
                dy.detach(), [v.detach() for v in d_final], ctx.needs_input_grad[2:],
            )  # fmt: skip
        if torch.is_grad_enabled():
            grads = once(grads, dy, *d_final, *saved)
        return None, None, *grads


def once(grads: Sequence[Tensor | None], *made_from: Tensor) -> Sequence[Tensor | None]:
    """Gradients as they are, which refuse to be differentiated."""
    return _Once.apply(len(grads), *grads, *made_from)  # type: ignore[misc]


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, count: int, *tensors: Tensor | None):  # type: ignore[override]
        return tuple(v if v is None else v.clone() for v in tensors[:count])

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        raise GradientError(
            "a parallelized module was differentiated twice; it provides first derivatives only, as cuDNN does. "
            "For second derivatives run the module that was given to ps.parallelize, under torch.backends.cudnn.flags(enabled=False)."
        )


def launch(
    task: Task, chunks: Chunks, x: Tensor, starts: Sequence[Tensor], weights: Sequence[Tensor], needed: Sequence[bool] | None
) -> Run:  # fmt: skip
    """One pass from `starts`, x in chunked order; with a graph for the inputs (x, states, weights) that are `needed`."""
    with torch.set_grad_enabled(needed is not None):
        if needed is not None:
            x = x.detach().requires_grad_(needed[0])
            starts = [v.detach().requires_grad_() for v in starts]
            wanted = needed[1 + len(starts) :]
            weights = [w.detach().requires_grad_(n) for w, n in zip(weights, wanted, strict=True)]
        lead = task.guess(chunks)
        if needed is None or lead == chunks.length:
            y, ends = task.shoot(x, chunks.batch_sizes(), starts, weights)
            return Run(x, starts, weights, [y], ends, ends)
        # In two pieces, so that a backward pass may be made over the first alone.
        head, tail = x.tensor_split([lead * chunks.rows])
        first, middle = task.shoot(head, None, starts, weights)
        second, ends = task.shoot(tail, None, middle, weights)
        return Run(x, starts, weights, [first, second], middle, ends)


class Course(NamedTuple):
    """The passes that were planned: the last `run` and the states it started from, how far starts moved in the first pass (None: there
    was no other) and after the last."""

    run: Run
    starts: Sequence[Tensor]
    begun: Tensor | None
    moved: Tensor


def course(
    task: Task, inner: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor], needed: Sequence[bool] | None
) -> Course:
    """The planned passes over the task's chunks, steps `inner` in chunked order, without waiting for the device."""
    chunks, lead, begun, before = task.chunks, task.guess(task.chunks), None, None
    starts = chunks.hand_on([v.new_zeros(chunks.rows, v.shape[1]) for v in initial], initial)
    for k in range(1, task.planned):
        part = inner[(chunks.length - lead) * chunks.rows :] if k == 1 else inner
        after = chunks.hand_on(launch(task, chunks, part, starts, weights, None).ends, initial)
        before = moves(after, starts)
        begun = before.max() if begun is None else begun
        starts = after
    run = launch(task, chunks, inner, starts, weights, needed)
    after = chunks.hand_on([e.detach() for e in run.ends], initial)
    moved = moves(after, starts)
    most = moved.max()
    if begun is not None and before is not None:
        # A start that did not come nearer counts as one that moved as far as any.
        (came,) = chunks.hand_on([before[:, None]], [before.new_zeros(len(initial[0]), 1)])
        most = torch.where(grew(after, starts, moved, before.maximum(came[:, 0])), most.maximum(begun), most)
    return Course(run, starts, begun, most)


def judge(task: Task, begun: Tensor | None, moved: Tensor, dtype: torch.dtype) -> tuple[bool, float, float]:
    """Whether the planned passes sufficed, contraction of a pass, steps in which the recurrence forgets. Waits for the device."""
    chunks, record, planned = task.chunks, task.record, task.planned
    record.chunk_length, record.passes, record.defect, record.recorded = chunks.length, planned, 0.0, False
    if chunks.count == 1:
        return True, 0.0, 0.0
    steps = task.guess(chunks) + (planned - 2) * chunks.length
    rate, horizon, record.defect = read(begun, moved, steps, planned, task.tol)
    record.learn(0, horizon, not record.defect <= max(task.tol / 2, noise(dtype)))
    return planned == task.exact(chunks) or is_settled(record.defect, rate, task.tol, dtype), rate, horizon


def forward(
    task: Task, x: Tensor, initial: Sequence[Tensor], weights: Sequence[Tensor], needed: Sequence[bool] | None
) -> tuple[Chunks, Run]:
    """Iterate on the chunks' starts; the run from the last of them, and the chunks it was over."""
    chunks, record, tol = task.chunks, task.record, task.tol
    inner = x.index_select(0, chunks.order)
    run, starts, begun, moved = course(task, inner, initial, weights, needed)
    done, rate, horizon = judge(task, begun, moved, x.dtype)
    if done:
        return chunks, run
    planned = record.passes
    if passes_left(horizon, chunks.length, planned) + 1 > task.affordable:
        chunks, starts = _whole(task, initial, record.defect)
        return chunks, launch(task, chunks, x.index_select(0, chunks.order), starts, weights, needed)
    ends, y = [e.detach() for e in run.ends], run.ys[0].detach() if needed is None else None
    del run  # its graph
    while True:  # only chunks whose start still moves; those before them are exact, so this ends
        after = chunks.hand_on(ends, initial)
        distance = moves(after, starts)
        active = (~(distance <= tol * (1 - rate))).nonzero()[:, 0]
        record.defect = float(distance.max())
        if len(active) == 0:
            break
        if record.passes == task.limit:
            raise ConvergenceError(record.passes, record.defect, tol, chunks.count)
        if record.passes - planned > task.affordable:
            chunks, starts = _whole(task, initial, record.defect)
            return chunks, launch(task, chunks, x.index_select(0, chunks.order), starts, weights, needed)
        places = chunks.places(active)
        some = [v.index_select(0, active) for v in after]
        part, reached = task.shoot(inner.index_select(0, places), chunks.batch_sizes(active), some, weights)
        if y is not None:
            y.index_copy_(0, places, part)
        for whole, v in zip((*ends, *starts), (*reached, *some), strict=True):
            whole.index_copy_(0, active, v)
        record.passes += 1
    if y is not None:
        return chunks, Run(inner, starts, weights, [y], ends, ends)
    return chunks, launch(task, chunks, inner, starts, weights, needed)


def _whole(task: Task, initial: Sequence[Tensor], defect: float) -> tuple[Chunks, list[Tensor]]:
    """One chunk a sequence, and where it starts; no chunks for a while, unless it was infinities that kept them from settling."""
    whole = task.whole()
    task.record.plainly()
    if math.isfinite(defect):
        task.record.give_up()
    return whole, whole.hand_on([v.new_empty(whole.rows, v.shape[1]) for v in initial], initial)


class Return(NamedTuple):
    """What came back through some passes: gradients by chunk ends `after` the last and `before` it, by starts, and by what else the last
    one was asked for."""

    after: Sequence[Tensor]
    before: Sequence[Tensor]
    by_starts: Sequence[Tensor]
    by_leaves: Sequence[Tensor]


def back(
    task: Task, chunks: Chunks, run: Run, dy: Tensor, d_final: Sequence[Tensor], across: Sequence[Tensor] | None, passes: int
) -> Return:  # fmt: skip
    """Backward passes from gradients dy in chunked order and `across` chunk ends (None: a guess), without waiting for the device."""
    leaves = [v for v in (run.x, *run.weights) if v.requires_grad]
    inner = dy.split([len(y) for y in run.ys])
    after = before = across or chunks.hand_back([torch.zeros_like(v) for v in run.starts], d_final)
    grads: Sequence[Tensor] = ()
    for left in reversed(range(passes)):
        before, wanted = after, [*run.starts, *(() if left else leaves)]
        outputs, by_outputs = (*run.ys, *run.ends), (*inner, *before)
        if len(run.ys) > 1 and left == passes - 1 > 0 and across is None:
            outputs, by_outputs = (run.ys[0], *run.middle), (inner[0], *map(torch.zeros_like, before))
        grads = torch.autograd.grad(outputs, wanted, by_outputs, retain_graph=left > 0)
        after = chunks.hand_back(grads[: len(run.starts)], d_final)
    return Return(after, before, grads[: len(run.starts)], grads[len(run.starts) :])


def judge_back(task: Task, chunks: Chunks, came: Return, done: int, dtype: torch.dtype) -> tuple[bool, float, float]:
    """Whether `done` backward passes sufficed, steps in which gradients are forgotten, the defect. Waits for the device."""
    if done >= task.exact(chunks):
        return True, 0.0, 0.0
    steps = task.guess(chunks) + (done - 2) * chunks.length
    rate, horizon, defect = read(None, relative_moves(came.after, came.before), steps, done, task.tol)
    task.record.learn(1, horizon, not defect <= max(task.tol / 2, noise(dtype)))
    return is_settled(defect, rate, task.tol, dtype), horizon, defect


def backward(
    task: Task,
    chunks: Chunks,
    run: Run | None,
    x: Tensor,
    starts: Sequence[Tensor],
    initial: Sequence[Tensor],
    weights: Sequence[Tensor],
    dy: Tensor,
    d_final: Sequence[Tensor],
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """Gradients by (x, initial states, weights), None where not `needed`, from those by the outputs and final states.

    `run` is the graph of the last forward pass, which this uses up; None: it is made again from `starts`.
    """
    done, across, passes = 0, None, min(task.passes[1], task.exact(chunks))
    while True:
        run = run or launch(task, chunks, x.index_select(0, chunks.order), starts, weights, needed)
        came = back(task, chunks, run, dy.index_select(0, chunks.order), d_final, across, passes)
        done += passes
        settled, horizon, defect = judge_back(task, chunks, came, done, x.dtype)
        if settled:
            break
        further, run, across = passes_left(horizon, chunks.length, done), None, came.after
        passes = int(min(further, task.exact(chunks) - done))
        if further > task.affordable:
            chunks, starts = _whole(task, initial, defect)
            passes, done, across = 1, 0, None
    task.record.backward_passes = done
    return gradients(chunks, came, needed)


def gradients(chunks: Chunks, came: Return, needed: Sequence[bool]) -> list[Tensor | None]:
    """Those that came back, in the caller's order of steps: by (x, initial states, weights), None where not `needed`."""
    states, by_leaves = len(came.by_starts), iter(came.by_leaves)
    d_x = next(by_leaves).index_select(0, chunks.inverse) if needed[0] else None
    wanted = zip(came.by_starts, needed[1:], strict=False)
    d_initial = [g.index_select(0, chunks.first) if n else None for g, n in wanted]
    return [d_x, *d_initial, *(next(by_leaves) if n else None for n in needed[1 + states :])]
