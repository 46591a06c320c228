"""`ps.parallelize`: PyTorch's own recurrent modules, in parallel over time, with cuDNN (on a CPU PyTorch's kernels) running the chunks."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, overload

import torch
from torch import _VF, Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from .errors import bad_type, bad_value
from .parallel_plan import MACHINES, SHORTEST, Cut, Shape, choose, fixed, kept, plainly
from .plan import MultipleShooting, Sequential, Solver, check_solver
from .solve.black_box import Record, Task, solve
from .solve.chunks import conjugate, cut
from .solve.recorded import Own, Recorded

_CALLS = {"GRU": _VF.gru, "LSTM": _VF.lstm, "RNN_TANH": _VF.rnn_tanh, "RNN_RELU": _VF.rnn_relu}
_TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
TIMED = 3  # call of a shape on which both ways are timed
SHAPES = 256  # of which calls are counted
ENOUGH = 512  # steps from which the time of a plain call is told
RECORDED = 4  # shapes whose passes a module keeps as CUDA graphs
AGAIN = 64  # calls of a shape that gave way to others until it is recorded again
_TF32 = 2e-4  # a state's rounding to ten bits in products is not below this

Course = tuple[Sequence[Cut], list[Recorded | None] | None]  # for each layer and direction


@dataclass
class Calls:
    """Of a shape: how many there were, how often a recording of them did not settle, whether both ways were timed, and how many times
    faster than predicted the module's own way was."""

    count: int = 0
    failures: int = 0
    timed: bool = False
    faster: float = 1.0


@overload
def parallelize(module: nn.GRU, solver: Solver | None = None) -> ParallelGRU: ...
@overload
def parallelize(module: nn.LSTM, solver: Solver | None = None) -> ParallelLSTM: ...
@overload
def parallelize(module: nn.RNN, solver: Solver | None = None) -> ParallelRNN: ...
def parallelize(module: Any, solver: Solver | None = None) -> Any:
    """The same recurrent module, run in parallel over time: s_{c+1} <- e_c, the ends of chunks that run side by side, until no start moves.

    - `module`: a `torch.nn.GRU`, `LSTM` or `RNN` with any of their options. It is left as it is; the result is one of the same
      class, with the same parameters (not copies), state dict and signature.
    - `solver`: None or `ps.MultipleShooting()`: chunk length by a plan that learns from the last calls how fast the cell
      forgets, and runs `module`'s own way where that is predicted to be faster; `ps.MultipleShooting(chunk_length=..., tol=...,
      max_iters=...)`: that; `ps.Sequential()`: always `module`'s own way.

    The result's `info` tells for each layer and direction how the last call went. Raises `ArgumentTypeError` for other modules,
    `ArgumentError` for options that need a cell's Jacobian or kernel; running it `ConvergenceError` where a set `max_iters` is
    missed, `GradientError` for second derivatives. Source: parareal (Lions, Maday, Turinici 2001) with the chunk's own solver.
    """
    kind = _CLASSES.get(type(module))
    if kind is None:
        bad_type(
            "module",
            type(module),
            "a module of type torch.nn.GRU, torch.nn.LSTM or torch.nn.RNN itself, no class derived from it",
            "Write the step of another recurrence as a @ps.cell and run it with ps.scan or ps.RNN.",
        )
    check_solver(solver)
    if isinstance(solver, MultipleShooting):
        if solver.jacobian == "diagonal":
            bad_value("jacobian", "'diagonal'", "'zero', 'auto' or the default", "cuDNN gives outputs, not Jacobians.")
        if solver.backend != "auto":
            bad_value(
                "backend", repr(solver.backend), "'auto'", "The chunks run in cuDNN, on a CPU in PyTorch's own kernels."
            )
    new = copy.copy(module)
    new.__dict__.update({k: copy.copy(v) for k, v in vars(module).items() if isinstance(v, (dict, list, set))})
    new.__class__ = kind
    new.solver, new.info = solver, [Record() for _ in module.all_weights]
    return new


class _Parallel(nn.RNNBase):
    """What the three classes share: a layer and direction at a time, each over chunks."""

    solver: Solver | None = None
    info: list[Record]

    @property
    def _asked(self) -> int | None:
        """The chunk length asked for; None where a plan chooses."""
        asked = self.solver.chunk_length if isinstance(self.solver, MultipleShooting) else "auto"
        return None if isinstance(asked, str) else int(asked)

    @torch.compiler.disable()  # it breaks the graph of PyTorch's own recurrent modules too
    def forward(self, input: Any, hx: Any = None) -> Any:
        """As the module given to `ps.parallelize`: same arguments, shapes, results and errors."""
        lengths = self._lengths(input)
        course = None if lengths is None else self._course(input, lengths)
        states = None if course is None else self._states(input, hx)
        if lengths and course and states is not None and self._pays(input, states, lengths, course):
            return self._over_chunks(input, states, lengths, course)
        for record in self.__dict__.get("info", ()):
            record.plainly()
        return super().forward(input, hx)  # type: ignore[call-arg]

    def _lengths(self, given: Any) -> tuple[int, ...] | None:
        """Steps of each sequence; None for what PyTorch has to run, or to refuse."""
        if isinstance(self.solver, Sequential) or torch.jit.is_tracing() or _forward_mode():
            return None
        if isinstance(given, PackedSequence):
            data, longest = given.data, len(given.batch_sizes)
        elif isinstance(given, Tensor) and given.dim() in (2, 3):
            data, longest = given, given.shape[0 if given.dim() == 2 or not self.batch_first else 1]
        else:
            return None
        kind = data.device.type
        if (
            longest < (SHORTEST if self._asked is None else 1)
            or kind not in MACHINES
            or data.shape[-1] != self.input_size
        ):
            return None
        capturing = kind == "cuda" and torch.cuda.is_current_stream_capturing()
        if capturing or (kind == "cpu" and torch.is_autocast_enabled("cpu")) or data.numel() == 0:
            return None
        if isinstance(given, PackedSequence):
            return tuple(conjugate(given.batch_sizes).tolist())
        return (longest,) * (1 if given.dim() == 2 else given.shape[0 if self.batch_first else 1])

    def _course(self, given: Any, lengths: tuple[int, ...]) -> Course | None:
        """What each layer and direction runs, and recordings of it; None: the module's own way."""
        records = self.__dict__.setdefault("info", [Record() for _ in self.all_weights])
        if self._asked is not None:
            length = min(self._asked, max(lengths))
            return [fixed(length, r.horizon()) for r in records], None
        key, recordings = self._key(given, lengths), self.__dict__.setdefault("_recordings", Own())
        calls, intercepted = self.__dict__.setdefault("_calls", Own()), _intercepted()
        if key in recordings and not intercepted:
            if all(r is None or r.usable for r in recordings[key][1]):
                recordings[key] = recordings.pop(key)  # the last used stand last
                return recordings[key]
            before, (_, gone) = calls.get(key, Calls()), recordings.pop(key)
            failures = before.failures + any(r is not None and r.failed for r in gone)
            calls[key] = Calls(TIMED - 2 ** min(failures, 10), failures, faster=before.faster)
        resting = [r.rested(max(lengths)) for r in records]
        if any(resting):
            return None
        calls.setdefault(key, Calls()).count += 1
        if len(calls) > SHAPES:
            del calls[next(iter(calls))]
        shape, (_, _, device, *_) = self._shape(given, lengths), key
        horizons = tuple(r.horizon() for r in records)
        may = calls[key].count <= TIMED and not isinstance(given, PackedSequence) and not intercepted
        faster = calls[key].faster
        recorded = choose(shape, horizons, True, faster) if may and _room(device) >= kept(shape) else None
        if recorded is not None and any(max(lengths) % c.length for c in recorded):
            recorded = None  # chunks of two lengths run as packed sequences
        if recorded is not None and calls[key].count == TIMED:
            recordings[key] = recorded, [None] * len(recorded)
            if len(recordings) > RECORDED:
                oldest = next(iter(recordings))
                del recordings[oldest]
                calls[oldest] = Calls(TIMED - AGAIN, faster=calls.get(oldest, Calls()).faster)
            return recordings[key]
        plan = choose(shape, horizons, False, faster)
        if plan is None and recorded is None and choose(shape, (Record().horizon(),) * len(records), False, faster):
            for r in records:
                r.give_up()
        return None if plan is None else (plan, None)

    def _key(self, given: Any, lengths: tuple[int, ...]) -> tuple:
        """What calls have in common that are timed once and may share a recording."""
        x = given.data if isinstance(given, PackedSequence) else given
        size = lengths if isinstance(given, PackedSequence) else x.shape
        needs = (torch.is_grad_enabled(), x.requires_grad, *(p.requires_grad for p in self.parameters()))
        return size, x.dtype, x.device, needs, _autocast_dtype(x), _tf32(x), self.solver

    def _shape(self, given: Any, lengths: tuple[int, ...]) -> Shape:
        x = given.data if isinstance(given, PackedSequence) else given
        training = torch.is_grad_enabled() and (x.requires_grad or any(p.requires_grad for p in self.parameters()))
        return Shape(
            self.mode, self.input_size, self.hidden_size, self.proj_size, self.num_layers, 1 + self.bidirectional,
            max(lengths), sum(lengths), _autocast_dtype(x), x.device.type,
            1 if x.is_cuda else torch.get_num_threads(), _tf32(x), training,
        )  # fmt: skip

    def _pays(self, given: Any, states: list[Tensor], lengths: tuple[int, ...], course: Course) -> bool:
        """Whether chunks are faster, in training forward and backward: timed on the `TIMED`-th call of a shape, when the plan has
        learned, and again after each rest; until then as the plan predicts."""
        if self._asked is not None or _intercepted():
            return True
        key = self._key(given, lengths)
        calls = self.__dict__["_calls"].get(key)
        if calls is None or calls.count != TIMED or calls.timed:
            return True
        x = given.data if isinstance(given, PackedSequence) else given
        x = x.detach().requires_grad_(x.requires_grad)
        whole, steps, scale = x, max(lengths), 1.0
        if isinstance(given, PackedSequence):
            x = whole = given._replace(data=x)
        elif steps > ENOUGH:
            x, scale = x.narrow(int(self.batch_first and x.dim() == 3), 0, ENOUGH), steps / ENOUGH
        states = [v.detach().requires_grad_(v.requires_grad) for v in states]
        chunked = self._seconds(lambda: self._over_chunks(whole, states, lengths, course)[0], whole)
        plain = scale * self._seconds(lambda: super(_Parallel, self).forward(x)[0], x)  # type: ignore[call-arg]
        calls.timed, calls.faster = True, min(max(plainly(self._shape(given, lengths)) / plain, 1 / 64), 64.0)
        if chunked <= plain:
            for record in self.info:
                record.wait = 32
            return True
        self.__dict__["_calls"][key] = Calls(faster=calls.faster)
        self.__dict__["_recordings"].pop(key, None)
        for record in self.info:
            record.give_up()
        return False

    def _seconds(self, run: Callable[[], Any], given: Any) -> float:
        """Of the second of two runs, with a backward pass where gradients are on."""
        data = given.data if isinstance(given, PackedSequence) else given
        leaves = [v for v in (data, *self.parameters()) if v.requires_grad] if torch.is_grad_enabled() else []
        wait = partial(torch.cuda.synchronize, data.device) if data.is_cuda else lambda: None
        begun = 0.0
        with torch.random.fork_rng([data.device] if data.is_cuda else []):
            for _ in range(2):
                wait()
                begun = time.perf_counter()
                y = run()
                if leaves:
                    torch.autograd.grad((y.data if isinstance(y, PackedSequence) else y).sum(), leaves)
                wait()
        return time.perf_counter() - begun

    def _states(self, given: Any, hx: Any) -> list[Tensor] | None:
        """The initial states (layers * directions, B, H), checked by PyTorch; None where it has to refuse them."""
        packed = isinstance(given, PackedSequence)
        data, batch_sizes = (given.data, given.batch_sizes) if packed else (given, None)
        single = not packed and data.dim() == 2
        if single:
            data = data.unsqueeze(0 if self.batch_first else 1)
        if hx is None:
            h = data.new_zeros(self.get_expected_hidden_size(data, batch_sizes))
            found = [h, h.new_zeros(*h.shape[:2], self.hidden_size)] if self.mode == "LSTM" else [h]
        else:
            found = list(hx) if self.mode == "LSTM" else [hx]
            if any(not isinstance(v, Tensor) or v.dim() != 3 - single or v.device != data.device for v in found):
                return None
            found = [v.unsqueeze(1) for v in found] if single else found
        self.check_forward_args(data, tuple(found) if self.mode == "LSTM" else found[0], batch_sizes)  # type: ignore[arg-type]
        if packed and given.sorted_indices is not None and hx is not None:
            found = [v.index_select(1, given.sorted_indices) for v in found]
        return found

    def _over_chunks(self, given: Any, states: list[Tensor], lengths: tuple[int, ...], course: Course) -> Any:
        packed = isinstance(given, PackedSequence)
        data = given.data if packed else given
        x = data if data.dim() == 2 else data.flatten(0, 1)
        dtype = _autocast_dtype(x)
        x, states = x.to(dtype), [v.to(dtype) for v in states]
        time_major = packed or (data.dim() == 3 and not self.batch_first)
        ways, finals = 1 + self.bidirectional, []
        for layer in range(self.num_layers):
            ys = []
            for k in range(layer * ways, (layer + 1) * ways):
                y, final = self._layer(k, x, [v[k] for v in states], lengths, course, time_major)
                ys.append(y)
                finals.append(final)
            x = torch.cat(ys, 1) if self.bidirectional else ys[0]
            if self.dropout and layer < self.num_layers - 1:
                x = nn.functional.dropout(x, self.dropout, self.training)
        last = [torch.stack(v) for v in zip(*finals, strict=True)]
        if packed:
            out = given._replace(data=x)
            if given.unsorted_indices is not None:
                last = [v.index_select(1, given.unsorted_indices) for v in last]
        else:
            out = x if data.dim() == 2 else x.unflatten(0, data.shape[:2])
            last = [v.squeeze(1) for v in last] if data.dim() == 2 else last
        return out, tuple(last) if self.mode == "LSTM" else last[0]

    def _layer(
        self, k: int, x: Tensor, initial: Sequence[Tensor], lengths: tuple[int, ...], course: Course, time_major: bool
    ) -> tuple[Tensor, list[Tensor]]:
        """Layer and direction k: x (N, D), initial states (B, H) -> y (N, H), final states."""
        plan, recordings = course
        reverse = self.bidirectional and k % 2 == 1
        sequences = partial(cut, lengths, time_major=time_major, reverse=reverse, device=x.device)
        given = self.solver if isinstance(self.solver, MultipleShooting) else MultipleShooting()
        tol = given.tol if given.tol is not None else _TF32 if _tf32(x) else _TOLERANCE[x.dtype]
        length, lead, passes, affordable = plan[k]
        task = Task(
            partial(_shoot, self.mode, self.bias), sequences(length), partial(sequences, max(lengths)), tol, lead, passes, affordable,
            given.max_iters, self.info[k],
        )  # fmt: skip
        weights = partial(self._weights, k)
        if recordings is not None:
            recorded = recordings[k] = recordings[k] or Recorded(task, x, initial, weights, self.all_weights[k])
            found = recorded.run(x, initial, weights, self.all_weights[k])
            if found is not None:
                return found
        return solve(task, x, initial, weights(x))

    def _weights(self, k: int, x: Tensor) -> list[Tensor]:
        """Those of layer and direction k as cuDNN wants them for inputs like x."""
        weights = [w.to(x.dtype) for w in self.all_weights[k]]
        if x.is_cuda and torch.backends.cudnn.enabled and torch._use_cudnn_rnn_flatten_weight():
            own = weights[0] is self.all_weights[k][0] and torch.backends.cudnn.is_acceptable(x)  # not bfloat16
            if not own or len(self.info) > 1:  # else `flatten_parameters` has put them in one piece
                sizes = (len(weights), x.shape[1], self.mode, self.hidden_size, self.proj_size)
                weights = _Flat.apply(sizes, *weights)  # type: ignore[misc]
        return list(weights)


class ParallelGRU(_Parallel, nn.GRU):
    """A `torch.nn.GRU` that runs in parallel over time; see `ps.parallelize`."""


class ParallelLSTM(_Parallel, nn.LSTM):
    """A `torch.nn.LSTM` that runs in parallel over time; see `ps.parallelize`."""


class ParallelRNN(_Parallel, nn.RNN):
    """A `torch.nn.RNN` that runs in parallel over time; see `ps.parallelize`."""


_CLASSES: dict[type, Any] = {nn.GRU: ParallelGRU, nn.LSTM: ParallelLSTM, nn.RNN: ParallelRNN}
_CLASSES |= {kind: kind for kind in _CLASSES.values()}


def _shoot(
    mode: str, biased: bool, x: Tensor, batch_sizes: Tensor | None, starts: Sequence[Tensor], weights: Sequence[Tensor]
) -> tuple[Tensor, list[Tensor]]:
    states = tuple(v.unsqueeze(0) for v in starts)
    hx: Any = states if mode == "LSTM" else states[0]
    options = (weights, biased, 1, 0.0, torch.is_grad_enabled(), False)
    with torch.autocast(x.device.type, enabled=False):
        if batch_sizes is None:
            y, *ends = _CALLS[mode](x.view(-1, len(starts[0]), x.shape[1]), hx, *options, False)
            y = y.flatten(0, 1)
        else:
            y, *ends = _CALLS[mode](x, batch_sizes, hx, *options)
    return y, [v.squeeze(0) for v in ends]


class _Flat(torch.autograd.Function):
    """Copies of a layer's weights in the one piece of memory that cuDNN reads."""

    @staticmethod
    def forward(ctx, sizes: tuple[int, int, str, int, int], *weights: Tensor):  # type: ignore[override]
        from torch.backends.cudnn import rnn

        count, inputs, mode, hidden, projected = sizes
        flat = [w.detach().clone() for w in weights]
        torch._cudnn_rnn_flatten_weight(
            flat, count, inputs, rnn.get_cudnn_mode(mode), hidden, projected, 1, False, False
        )
        return tuple(flat)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        return None, *grads


def _forward_mode() -> bool:
    """Whether derivatives are taken in a way in which chunks provide none."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def _intercepted() -> bool:
    """Whether somebody takes what autograd saves (checkpointing, offloading): then nothing may be kept beside it."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None  # type: ignore[attr-defined]


def _room(device: torch.device) -> int:
    """Bytes that a recording may keep."""
    return torch.cuda.get_device_properties(device).total_memory // 64 if device.type == "cuda" else 0


def _autocast_dtype(x: Tensor) -> torch.dtype:
    if not torch.is_autocast_enabled(x.device.type) or x.dtype == torch.float64:
        return x.dtype
    halves = (
        x.is_cuda and torch.backends.cudnn.enabled
    )  # PyTorch casts to float16 for cuDNN, whatever autocast was given
    return torch.float16 if halves else torch.get_autocast_dtype(x.device.type)


def _tf32(x: Tensor) -> bool:
    return x.is_cuda and x.dtype == torch.float32 and torch.backends.cudnn.rnn.fp32_precision == "tf32"  # type: ignore[attr-defined]
