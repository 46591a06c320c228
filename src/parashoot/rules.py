"""The rules of a step, checked by running it once on small random tensors: what it returns, and what it must not do."""

from __future__ import annotations

import inspect
import linecache
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from .cell import Cell
from .errors import CellError, bad_cell, describe

Tensors = Sequence[Tensor]


def check_rules(cell: Cell, states: Tensors, inputs: Tensors, params: Tensors) -> dict[str, str]:
    """Run the step once; the user's line for each operation. Raises `CellError`."""
    rules, name, slots = _Rules(cell), cell.name, len(cell.states)
    rules.given = {v.untyped_storage().data_ptr() for v in (*states, *inputs, *params)}
    try:
        with _ReadsOut(rules), rules, torch.no_grad():
            out = cell.step(*states, *inputs, *params)
    except Exception as e:
        if rules.problem:
            raise rules.problem from None
        shapes = {
            a: tuple(v.shape)
            for a, v in zip(cell.states + cell.inputs + cell.params, [*states, *inputs, *params], strict=True)
        }
        bad_cell(
            name,
            f"the step failed on arguments of shapes {shapes}: {type(e).__name__}: {e}",
            "Make it run on such tensors.",
        )
    if rules.problem:
        raise rules.problem
    new = (out,) if isinstance(out, Tensor) else out
    if not isinstance(new, (tuple, list)) or len(new) != slots or not all(isinstance(v, Tensor) for v in new):
        came = [describe(v) for v in new] if isinstance(new, (tuple, list)) else describe(new)
        bad_cell(
            name,
            f"the step returned {came}",
            f"Return the {slots} new state(s) {cell.states}, each a tensor, in that order.",
        )
    for slot, old, v in zip(cell.states, states, new, strict=True):
        if v.dtype != old.dtype:
            bad_cell(
                name,
                f"state '{slot}' came back as {v.dtype}, was {old.dtype}",
                "Keep the dtype of the state that came in.",
            )
        try:
            fits = torch.broadcast_shapes(v.shape, old.shape) == old.shape
        except RuntimeError:
            fits = False
        if not fits:
            bad_cell(
                name,
                f"state '{slot}' came back with shape {tuple(v.shape)}, was {tuple(old.shape)}",
                "Keep the shape of each state.",
            )
    return rules.lines


class _Rules(TorchDispatchMode):
    """Notes in-place writes, randomness and values read out, with the user's line.

    The first problem is kept, not only raised: Python's operators swallow a `TypeError` on their way.
    """

    def __init__(self, cell: Cell):
        super().__init__()
        self.cell, self.lines = cell, {}
        self.problem: CellError | None = None
        self.given: set[int] = set()  # where the step's arguments lie
        self.called = ""  # the function of PyTorch that runs, if any: some write on what they made themselves

    def line(self) -> str:
        frame, code = sys._getframe(2), self.cell.step.__code__
        while frame is not None and frame.f_code is not code:
            frame = frame.f_back
        return "" if frame is None else _quote(self.cell, frame.f_lineno)

    def refuse(self, problem: str, remedy: str, line: str) -> None:
        try:
            bad_cell(self.cell.name, problem, remedy, line)
        except CellError as e:
            self.problem = self.problem or e
            raise

    def writes_on_given(self, func: Any, args: Sequence[Any]) -> bool:
        written = (
            a for a, v in zip(args, func._schema.arguments, strict=False) if v.alias_info and v.alias_info.is_write
        )
        return any(isinstance(a, Tensor) and a.untyped_storage().data_ptr() in self.given for a in written)

    def read_out(self, line: str) -> None:
        remedy = "Use torch.where: every step must do the same operations."
        self.refuse("the step branches on, or reads out, the value of a tensor", remedy, line)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        line = self.line()
        self.lines.setdefault(func._schema.name, line)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.refuse(
                f"the step is random ({func})", "Draw random numbers outside and pass them as a ps.Input.", line
            )
        if func._schema.is_mutable and (_in_place(self.called) or self.writes_on_given(func, args)):
            self.refuse(f"the step writes in place ({func})", "Return new tensors: h = h + u, not h += u.", line)
        if func._schema.name in ("aten::_local_scalar_dense", "aten::equal", "aten::nonzero", "aten::is_nonzero"):
            self.read_out(line)
        return func(*args, **(kwargs or {}))


class _ReadsOut(TorchFunctionMode):
    """What hands out values without an operation that `_Rules` would see."""

    def __init__(self, rules: _Rules):
        super().__init__()
        self.rules = rules

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", "").partition(".")[0], kwargs or {}  # of "add_.Tensor" too
        if name in ("tolist", "numpy", "__array__", "data_ptr"):
            self.rules.read_out(self.rules.line())
        self.rules.called = "out_" if _asks_to_write(func, args, kwargs) else name
        try:
            return func(*args, **kwargs)
        finally:
            self.rules.called = ""


def _asks_to_write(func: Any, args: Any, kwargs: dict[str, Any]) -> bool:
    try:
        given = inspect.signature(func).bind(*args, **kwargs).arguments
    except (TypeError, ValueError):  # not of Python
        given = kwargs
    return bool(given.get("inplace")) or given.get("out") is not None


def _in_place(name: str) -> bool:
    return name in ("__setitem__", "") or (name.endswith("_") and not name.endswith("__")) or name.startswith("__i")


def line_of(cell: Cell, error: BaseException) -> str:
    """The line of the step in which `error` arose, or ""."""
    at: TracebackType | None = error.__traceback__
    found = ""
    while at is not None:
        if at.tb_frame.f_code is cell.step.__code__:
            found = _quote(cell, at.tb_lineno)
        at = at.tb_next
    return found


def _quote(cell: Cell, number: int) -> str:
    name = cell.step.__code__.co_filename
    return f"{name}:{number}: {linecache.getline(name, number).strip()}"
