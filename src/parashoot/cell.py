"""`@ps.cell`: one step of a recurrence, written in plain PyTorch, and what its signature says about it.

    h_t = f(h_{t-1}, x_t; params)

The annotations `State`, `Input` and `Param` give each argument its role; everything else (derivatives, structure,
parallel solution, kernels) is derived from the function itself in `trace.py`.
"""

from __future__ import annotations

import dis
import functools
import importlib
import inspect
import itertools
import math
import sys
import types
import typing
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass
from typing import Annotated, Any

import torch
from torch import Tensor
from torch._ops import OpOverload, OpOverloadPacket

from .errors import ArgumentError, CellError, bad_cell

State = Annotated[Tensor, "parashoot.state"]
Input = Annotated[Tensor, "parashoot.input"]
Param = Annotated[Tensor, "parashoot.param"]

STRUCTURES = ("channelwise", "headwise", "dense")
_ROLES = ("parashoot.state", "parashoot.input", "parashoot.param")
_registry: dict[str, Cell] = {}
_serial = itertools.count()


@dataclass(frozen=True, eq=False)
class Cell:
    """One step of a recurrence and the roles of its arguments; made by `@ps.cell`, hashable by identity.

    `with_bias`: the same step of inputs shifted by as many further vector parameters, f(h, x + b; params, b).
    """

    step: Callable[..., Any]
    name: str
    states: tuple[str, ...]
    inputs: tuple[str, ...]
    params: tuple[str, ...]
    structure: str
    width: int | None
    output: int
    key: str
    with_bias: Cell | None = None

    def __call__(self, *args: Tensor) -> Any:
        """The plain step: `cell(*states, *inputs, *params)`."""
        return self.step(*args)

    def new_states(self, states: Any, inputs: Any, params: Any) -> tuple[Tensor, ...]:
        """One step as a tuple of new states, whatever the number of slots."""
        out = self.step(*states, *inputs, *params)
        return (out,) if isinstance(out, Tensor) else tuple(out)

    def with_width(self, width: int) -> Cell:
        """The same headwise step with heads of another `width`."""
        if self.structure != "headwise":
            raise ArgumentError(
                f"cell '{self.name}': got structure '{self.structure}'; only headwise cells have a width."
            )
        return _make(self.step, "headwise", width, self.states[self.output])

    def triton_source(self, direction: str = "forward", *, reset: bool = False, return_states: bool = False) -> str:
        """The Triton source of this cell's kernels, as it is compiled: `direction` "forward", "backward" or "decode".

        Raises `BackendError` if the cell is not channelwise or uses an operation without a kernel expression.
        """
        # By name, for what stands to the right of cells knows them, and not the other way round.
        return importlib.import_module("parashoot.triton.sweep").text(self, direction, reset, return_states)

    def fingerprint(self) -> tuple:
        """A value that changes whenever the code, closures or globals that the step reads change."""
        return _fingerprint(self.step, self.name, set())

    def __repr__(self) -> str:
        width = f", width={self.width}" if self.width else ""
        return (
            f"Cell({self.name}: states {self.states}, inputs {self.inputs}, params {self.params}, "
            f"{self.structure}{width}, output {self.states[self.output]})"
        )

    def __deepcopy__(self, memo: dict) -> Cell:
        return self

    def __reduce__(self):
        found = sys.modules.get(self.step.__module__)
        for part in self.step.__qualname__.split("."):
            found = getattr(found, part, None)
        if found is self:
            return _import_cell, (self.step.__module__, self.step.__qualname__)
        if isinstance(found, Cell) and found.step is self.step:
            return _import_cell, (self.step.__module__, self.step.__qualname__, self.width)
        raise TypeError(
            f"cell '{self.name}' cannot be pickled: {self.step.__module__}.{self.step.__qualname__} is not this cell. "
            "Define cells at module level and keep the decorated name."
        )


def _import_cell(module: str, qualname: str, width: int | None = None) -> Cell:
    found: Any = __import__(module, fromlist=["_"])
    for part in qualname.split("."):
        found = getattr(found, part)
    return found.with_width(width) if width else found


def get_cell(key: str) -> Cell:
    """The cell registered under `key`: what the custom op, which takes strings, looks up."""
    return _registry[key]


def cell(
    step: Callable | None = None, *, structure: str = "channelwise", width: int | None = None, output: str | None = None
) -> Any:
    """Turn one step written in PyTorch into a `Cell`: `h_t = f(h_{t-1}, x_t; params)`.

    Arguments of the step are annotated `ps.State`, `ps.Input` or `ps.Param`, in that order of kinds. It returns the new
    states in the order of its `State` arguments (one tensor if there is one).

    - `structure`: "channelwise" (default, proved from the traced step): every operation is elementwise. "headwise":
      the `width` channels of a head mix; the step sees states and inputs of shape (..., H, width), vector parameters
      (H, width), matrix parameters (H, width, width). "dense": all channels mix; states (..., C), matrices (C, C).
    - `output`: name of the state that `y` carries; default the last one.

    Raises `CellError` for a signature that does not say the roles, `ArgumentError` for a bad option.
    """
    if step is None:
        return lambda f: _make(f, structure, width, output)
    return _make(step, structure, width, output)


def _make(step: Callable, structure: str, width: int | None, output: str | None) -> Cell:
    if not isinstance(step, types.FunctionType):
        raise CellError(
            f"@ps.cell: got {type(step).__name__}; expected a plain Python function (def step(h: ps.State, ...))."
        )
    name = step.__name__
    if structure not in STRUCTURES:
        raise ArgumentError(f"cell '{name}': structure: got {structure!r}; expected one of {STRUCTURES}.")
    if (structure == "headwise") != (width is not None) or (
        width is not None and (not isinstance(width, int) or width < 1)
    ):
        raise ArgumentError(
            f"cell '{name}': width: got {width!r} with structure {structure!r}; a headwise cell, and only that, "
            "takes width=n with n >= 1."
        )
    roles = _roles(step, name)
    by_role = {r: tuple(a for a, role in roles.items() if role == r) for r in _ROLES}
    states, inputs, params = (by_role[r] for r in _ROLES)
    if list(roles) != [*states, *inputs, *params]:
        bad_cell(name, f"argument order is {list(roles)}", "Put all ps.State first, then ps.Input, then ps.Param.")
    if not states:
        bad_cell(name, "no argument is annotated ps.State", "Annotate the recurrent state: def step(h: ps.State, ...).")
    if not inputs:
        bad_cell(
            name,
            "no argument is annotated ps.Input",
            "Annotate at least one input: def step(h: ps.State, x: ps.Input).",
        )
    if output is not None and output not in states:
        raise ArgumentError(f"cell '{name}': output: got {output!r}; expected the name of a state, one of {states}.")
    index = states.index(output) if output is not None else len(states) - 1
    key = f"{step.__module__}.{step.__qualname__}#{next(_serial)}"
    facts = (structure, width, index)
    biased = Cell(
        _shifted(step, len(states), len(inputs)), name, states, inputs, (*params, *(f"b_{x}" for x in inputs)), *facts, f"{key}+b"
    )  # fmt: skip
    made = Cell(step, name, states, inputs, params, *facts, key, biased)
    for new in (made, biased):
        object.__setattr__(new, "__doc__", step.__doc__)
        _registry[new.key] = new
    return made


def _shifted(step: Callable[..., Any], slots: int, inputs: int) -> Callable[..., Any]:
    def shifted(*args: Tensor) -> Any:
        moved = [x + b for x, b in zip(args[slots : slots + inputs], args[-inputs:], strict=True)]
        return step(*args[:slots], *moved, *args[slots + inputs : -inputs])

    return shifted


def _roles(step: types.FunctionType, name: str) -> dict[str, str]:
    hints = {a: h for a, h in step.__annotations__.items() if a != "return"}
    if any(isinstance(h, str) for h in hints.values()):  # from __future__ import annotations
        inside = dict(zip(step.__code__.co_freevars, (c.cell_contents for c in step.__closure__ or ()), strict=True))
        try:
            hints = {a: eval(h, step.__globals__, inside) if isinstance(h, str) else h for a, h in hints.items()}
        except NameError as e:
            bad_cell(
                name, f"annotation not found: {e}", "Import parashoot as ps at module level and annotate with ps.State."
            )
    roles = {}
    for arg in inspect.signature(step).parameters.values():
        role = next((m for m in typing.get_args(hints.get(arg.name))[1:] if m in _ROLES), None)
        if (
            role is None
            or arg.kind not in (arg.POSITIONAL_ONLY, arg.POSITIONAL_OR_KEYWORD)
            or arg.default is not arg.empty
        ):
            bad_cell(
                name,
                f"argument '{arg}' has no role",
                "Annotate every argument ps.State, ps.Input or ps.Param, with no default, * or **.",
            )
        roles[arg.name] = role
    return roles


# What a step reads besides its arguments. Anything that could change unnoticed is refused.

_STABLE_MODULES = ("torch", "math", "numpy", "builtins", "parashoot")


def _fingerprint(fn: types.FunctionType, name: str, seen: set) -> tuple:
    if fn in seen:
        return ()
    seen.add(fn)
    code, found = fn.__code__, []
    reads, imports, static = _code_facts(code)
    for hidden in ("eval", "exec", "globals"):
        if hidden in reads and hidden not in fn.__globals__:
            bad_cell(name, f"the step calls {hidden}", "What it reads could change unnoticed. Write names themselves.")
    for module in imports:
        found.append((module, _value(_imported(module, fn, name), module, code, name, seen)))
    for var, slot in zip(code.co_freevars, fn.__closure__ or (), strict=True):
        found.append((var, _value(slot.cell_contents, var, code, name, seen)))
    for var in reads:
        if var in fn.__globals__:
            found.append((var, _value(fn.__globals__[var], var, code, name, seen)))
    defaults = _value((fn.__defaults__ or (), fn.__kwdefaults__ or {}), "a default", code, name, seen)
    return (static, tuple(found), defaults)


@functools.lru_cache(maxsize=1024)
def _codes(code: types.CodeType) -> tuple[types.CodeType, ...]:
    """A function's code and that of all functions written inside it."""
    inner = (_codes(c) for c in code.co_consts if isinstance(c, types.CodeType))
    return (code, *itertools.chain.from_iterable(inner))


@functools.lru_cache(maxsize=1024)
def _names(code: types.CodeType) -> tuple[str, ...]:
    """The names of attributes and globals in a function and in those that are written inside it."""
    return tuple(dict.fromkeys(name for c in _codes(code) for name in c.co_names))


@functools.lru_cache(maxsize=1024)
def _code_facts(code: types.CodeType) -> tuple[list[str], list[str], tuple]:
    """The globals that a function reads, the modules that it imports, relative ones with their dots, and what it does with them."""
    reads, imports, level = set(), [], 0
    for i in itertools.chain.from_iterable(map(dis.get_instructions, _codes(code))):
        if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            reads.add(i.argval)
        elif i.opname == "IMPORT_NAME":
            imports.append("." * level + i.argval)
        elif i.opname.startswith(("LOAD_CONST", "LOAD_SMALL_INT")):
            level = i.argval if isinstance(i.argval, int) else level
    constants = lambda c: tuple("code" if isinstance(v, types.CodeType) else repr(v) for v in c.co_consts)
    return sorted(reads), imports, tuple((c.co_code, c.co_names, constants(c)) for c in _codes(code))


def _imported(module: str, fn: types.FunctionType, name: str) -> types.ModuleType:
    try:
        return importlib.import_module(module, fn.__globals__.get("__package__"))
    except ImportError as e:
        bad_cell(name, f"the step imports '{module}', which fails ({e})", "Import it at the top of the file.")


def _value(v: Any, var: str, code: types.CodeType, name: str, seen: set) -> Any:
    if v is None or isinstance(v, (bool, int, float, complex, str, bytes, torch.dtype, torch.device)):
        return (type(v).__name__, repr(v))
    if isinstance(v, Tensor):
        bad_cell(
            name,
            f"the step reads the tensor '{var}' from outside its arguments",
            "Pass it as a ps.Param (it then also gets a gradient) or, if it is a number, as a Python float.",
        )
    if isinstance(v, Cell):
        return _value(v.step, var, code, name, seen)
    if isinstance(v, (tuple, list, set, frozenset)):
        return (type(v).__name__, tuple(_value(u, var, code, name, seen) for u in v))
    if isinstance(v, dict):
        return tuple((repr(k), _value(u, var, code, name, seen)) for k, u in v.items())
    module = (v.__name__ if isinstance(v, types.ModuleType) else getattr(v, "__module__", None) or "").split(".")[0]
    if isinstance(v, types.ModuleType):
        if module in _STABLE_MODULES:
            return v.__name__
        return (v.__name__, *((a, _value(getattr(v, a), a, code, name, seen)) for a in _names(code) if hasattr(v, a)))
    if isinstance(v, type) and module not in _STABLE_MODULES:
        members = [] if v in seen else _read_of(v, code)
        seen.add(v)
        return (f"{module}.{v.__qualname__}", *((a, _member(v, a, code, name, seen)) for a in members))
    if isinstance(v, types.FunctionType) and module not in _STABLE_MODULES:
        own = ((a, _value(vars(v)[a], a, code, name, seen)) for a in _names(code) if a in vars(v))
        return (*_fingerprint(v, name, seen), *own)
    if is_dataclass(v) and not isinstance(v, type):
        return (type(v).__qualname__, *(_value(getattr(v, f.name), f.name, code, name, seen) for f in fields(v)))
    if isinstance(v, types.SimpleNamespace):
        return _value(vars(v), var, code, name, seen)
    if isinstance(v, (torch.finfo, torch.iinfo)):
        return repr(v)
    if isinstance(v, (types.FunctionType, types.BuiltinFunctionType, type, OpOverload, OpOverloadPacket)):
        return f"{module}.{getattr(v, '__qualname__', type(v).__qualname__)}"
    bad_cell(
        name,
        f"the step reads '{var}', a {type(v).__name__}, from outside its arguments",
        "A change of it could not be noticed. Read numbers, strings, tuples, dataclasses and functions only.",
    )


_DERIVED = ("forward", "backward", "setup_context", "jvp")


def _read_of(kind: type, code: types.CodeType) -> list[str]:
    """The attributes of a class that `code` names, or that methods name which it names; of a `torch.autograd.Function` those of its own."""
    derived = issubclass(kind, torch.autograd.Function)
    names, base = [*_names(code), *(_DERIVED if derived else ())], torch.autograd.Function if derived else object
    found: list[str] = []
    for a in names:
        member = inspect.getattr_static(kind, a, None)
        if a in found or not hasattr(kind, a) or hasattr(object, a) or member is inspect.getattr_static(base, a, None):
            continue
        found.append(a)
        member = member.__func__ if isinstance(member, (staticmethod, classmethod)) else member
        names += _names(member.__code__) if isinstance(member, types.FunctionType) else ()
    return found


_READABLE = (
    type(None), bool, int, float, complex, str, bytes, tuple, list, dict, Tensor, Cell, types.FunctionType, type,
)  # fmt: skip


def _member(kind: type, attribute: str, code: types.CodeType, name: str, seen: set) -> Any:
    """What a step may read of a class: numbers and functions; of properties and their like only that they are there."""
    found = inspect.getattr_static(kind, attribute)
    found = found.__func__ if isinstance(found, (staticmethod, classmethod)) else found
    if isinstance(found, _READABLE):
        return _value(found, f"{kind.__qualname__}.{attribute}", code, name, seen)
    return type(found).__qualname__


# Shapes that follow from a cell.


def parameter_kinds(cell: Cell) -> tuple[str, ...]:
    """'vector' or 'matrix' for each parameter: the first assignment, vectors preferred, with which the step runs."""
    if cell.structure == "channelwise":
        return ("vector",) * len(cell.params)
    width = cell.width or 5
    heads = 3 if width != 3 else 4
    feature = (heads, width) if cell.structure == "headwise" else (width,)
    matrix = (heads, width, width) if cell.structure == "headwise" else (width, width)
    moving = [torch.zeros(7, *feature) for _ in range(len(cell.states) + len(cell.inputs))]
    slots = len(cell.states)
    for pattern in sorted(range(2 ** len(cell.params)), key=lambda p: p.bit_count()):
        kinds = tuple("matrix" if pattern >> i & 1 else "vector" for i in range(len(cell.params)))
        params = [torch.zeros(matrix if kind == "matrix" else feature) for kind in kinds]
        try:
            new = cell.new_states(moving[:slots], moving[slots:], params)
        except Exception:
            continue
        if len(new) == slots and all(v.shape == moving[0].shape for v in new):
            return kinds
    bad_cell(cell.name, "the step runs with no choice of vector or matrix for its parameters",
             f"A {cell.structure} step takes parameters of shape {feature} or {matrix} here, states of shape {(7, *feature)}.")  # fmt: skip


def feature_shape(cell: Cell, channels: int) -> tuple[int, ...]:
    """(C,), or (H, n) for a headwise cell."""
    return (channels // cell.width, cell.width) if cell.width else (channels,)


def parameter_shapes(cell: Cell, channels: int) -> list[tuple[int, ...]]:
    """The shape of each parameter of `cell` at C = `channels`: (C,), (H, n, n) or (C, C)."""
    matrix = (channels // cell.width, cell.width, cell.width) if cell.width else (channels, channels)
    return [matrix if kind == "matrix" else (channels,) for kind in parameter_kinds(cell)]


def sizes(x: Tensor) -> tuple[int, int, int, int]:
    """(B, T, G, C) of x (B, T, G, C), or of x (B, T, G, H, C / H) whose channels lie in H heads."""
    batch, time, inputs, *channels = x.shape
    return batch, time, inputs, math.prod(channels)


def gradient_like(x: Tensor) -> Tensor:
    """Where the gradient by x goes: contiguous or, for channels in heads, laid out as x, for what made x will read it."""
    like = torch.empty_like(x) if x.dim() == 5 else None
    return like if like is not None and like.stride(4) == 1 else x.new_empty(x.shape)
