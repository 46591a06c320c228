"""The canonical form of a traced elementwise step: straight-line scalar code, constants folded, subexpressions shared.

A `Graph` says nothing about shapes: it is the computation of one channel at one step, or of one head whose channels meet in products
with its matrices (`mix`) and sums (`total`, see heads.py). `torch` evaluates it on arrays of any broadcastable shapes; a kernel printer prints the same
lines as expressions. Its text is what a digest is taken of.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

Atom = str | float | bool  # a name, or a constant

# Canonical operations as Python expressions over torch. Python operators also take constants on either side.
EXPRESSIONS = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "{} / {}", "neg": "-{}",
    "lt": "{} < {}", "le": "{} <= {}", "gt": "{} > {}", "ge": "{} >= {}", "eq": "{} == {}", "ne": "{} != {}",
    "and": "{} & {}", "or": "{} | {}", "not": "~{}", "pow": "({}) ** {}",
    "exp": "torch.exp({})", "expm1": "torch.expm1({})", "log": "torch.log({})", "log1p": "torch.log1p({})",
    "sin": "torch.sin({})", "cos": "torch.cos({})", "tanh": "torch.tanh({})", "sigmoid": "torch.sigmoid({})",
    "sqrt": "torch.sqrt({})", "rsqrt": "torch.rsqrt({})", "abs": "torch.abs({})", "sign": "torch.sign({})",
    "erf": "torch.erf({})", "atan2": "_atan2({}, {})", "hypot": "_hypot({}, {})",
    "maximum": "_maximum({}, {})", "minimum": "_minimum({}, {})", "where": "_where({}, {}, {})",
    "mix": "torch.einsum('hij,rhj->rhi', {}, {})", "mix_t": "torch.einsum('hij,rhi->rhj', {}, {})",
    "total": "({}).sum(-1, keepdim=True)",
}  # fmt: skip
_COMMUTATIVE = {"add", "mul", "maximum", "minimum", "eq", "ne", "and", "or", "hypot"}
_ALIASES = {"alias", "clone", "detach", "lift_fresh_copy", "lift_fresh"}
_RENAMED = {
    "bitwise_and": "and", "logical_and": "and", "bitwise_or": "or", "logical_or": "or", "bitwise_not": "not",
    "logical_not": "not", "sgn": "sign",
}  # fmt: skip
_aten = torch.ops.aten
SHRUNK = dict.fromkeys(
    (_aten.softshrink_backward.default, _aten.hardshrink_backward.default),
    lambda grad, v, by: torch.where(v.abs() > by, grad, 0.0),
)
"""Derivatives that PyTorch neither marks as elementwise nor takes apart."""


_NUMBERS = ("add", "sub", "mul", "div", "pow", "maximum", "minimum", "where", "masked_fill", "copy")
"""Operations on numbers, in which a mask among the operands stands for 1 and 0."""


class UnknownOperation(Exception):
    """An operation that is not elementwise, so that the traced step is not channelwise."""


def _is_const(a: Any) -> bool:
    return isinstance(a, (int, float)) and not isinstance(a, str)


def _maximum(a: Any, b: Any) -> torch.Tensor:
    if _is_const(b):
        return torch.clamp(a, min=b)
    return torch.clamp(b, min=a) if _is_const(a) else torch.maximum(a, b)


def _minimum(a: Any, b: Any) -> torch.Tensor:
    if _is_const(b):
        return torch.clamp(a, max=b)
    return torch.clamp(b, max=a) if _is_const(a) else torch.minimum(a, b)


class Builder:
    """Appends operations, folding constants and sharing equal subexpressions."""

    def __init__(self, inputs: Iterable[str]):
        self.inputs = tuple(inputs)
        self.ops: dict[str, tuple[str, tuple[Atom, ...]]] = {}
        self.calls: dict[str, Callable] = {}
        self._seen: dict[tuple, str] = {}

    def add(self, op: str, *given: Atom, call: Callable | None = None) -> Atom:
        args: tuple[Atom, ...] = tuple(float(a) if isinstance(a, int) and not isinstance(a, bool) else a for a in given)
        folded = self._simplify(op, args)
        if folded is not None:
            return folded
        if op == "sub" and _is_const(args[0]) and args[0] == 0:
            op, args = "neg", (args[1],)
        if op == "add":  # -a + b is b - a
            for a, b in (tuple(args), tuple(reversed(args))):
                if isinstance(a, str) and self.ops.get(a, ("", ()))[0] == "neg":
                    return self.add("sub", b, self.ops[a][1][0])
        if op in _COMMUTATIVE:
            args = tuple(sorted(args, key=lambda a: (_is_const(a), str(a))))
        key = (op, *map(repr, args))  # True is 1.0 to a dict, and -0.0 is 0.0
        if key not in self._seen:
            self._seen[key] = name = f"v{len(self.ops)}"
            self.ops[name] = (op, args)
            if call is not None:
                self.calls[op] = call
        return self._seen[key]

    def _simplify(self, op: str, args: tuple[Atom, ...]) -> Atom | None:
        consts = [_is_const(a) for a in args]
        if all(consts) and op in EXPRESSIONS:
            value = _evaluate(op, [torch.tensor(a, dtype=None if isinstance(a, bool) else torch.float64) for a in args])
            return bool(value) if value.dtype == torch.bool else float(value)
        zero = [c and a == 0 for c, a in zip(consts, args, strict=True)]
        one = [c and a == 1 and not isinstance(a, bool) for c, a in zip(consts, args, strict=True)]
        if op == "mul":
            if any(zero):
                return 0.0
            if any(one):
                return args[1] if one[0] else args[0]
        elif op == "add" and any(zero):
            return args[1] if zero[0] else args[0]
        elif (op == "sub" and zero[1]) or (op == "div" and one[1]) or (op == "pow" and one[1]):
            return args[0]
        elif op == "div" and zero[0]:
            return 0.0
        elif op == "where":
            if consts[0]:
                return args[1] if args[0] else args[2]
            if repr(args[1]) == repr(args[2]):
                return args[1]
        elif op == "neg" and isinstance(args[0], str) and self.ops.get(args[0], ("", ()))[0] == "neg":
            return self.ops[args[0]][1][0]
        return None

    def inline(self, graph: Graph, binding: Mapping[str, Atom]) -> list[Atom]:
        """Append `graph` with some inputs bound to constants; what it returns, in this builder's names."""
        values: dict[str, Atom] = {i: binding.get(i, i) for i in graph.inputs}
        for name, (op, args) in graph.ops.items():
            values[name] = self.add(
                op, *(values.get(a, a) if isinstance(a, str) else a for a in args), call=graph.calls.get(op)
            )
        return [values.get(a, a) if isinstance(a, str) else a for a in graph.outputs]

    def graph(self, outputs: Iterable[Atom]) -> Graph:
        """The finished graph: operations that no output needs are dropped, names made consecutive."""
        outputs = tuple(outputs)
        needed, live = {o for o in outputs if isinstance(o, str)}, []
        for name, (op, args) in reversed(self.ops.items()):
            if name in needed:
                live.append((name, op, args))
                needed.update(a for a in args if isinstance(a, str))
        names = {n: f"v{k}" for k, (n, _, _) in enumerate(reversed(live))}
        renamed = lambda a: names.get(a, a) if isinstance(a, str) else a
        ops = {names[n]: (op, tuple(map(renamed, args))) for n, op, args in reversed(live)}
        calls = {op: self.calls[op] for op, _ in ops.values() if op in self.calls}
        return Graph(self.inputs, ops, tuple(map(renamed, outputs)), calls)


_COMPARISONS = {"lt", "le", "gt", "ge", "eq", "ne", "sign"}  # where a result or its derivative jumps

# Those that take more than one instruction of a GPU, and roughly how many.
_INSTRUCTIONS = {
    "exp": 3, "log": 20, "tanh": 2, "sigmoid": 3, "div": 5, "sin": 20, "cos": 20, "erf": 30, "atan2": 40, "hypot": 15, "log1p": 40, "expm1": 15, "pow": 4,
    "mix": 32, "mix_t": 32, "total": 24,
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Graph:
    """Named inputs, operations in order, outputs that are names or constants."""

    inputs: tuple[str, ...]
    ops: dict[str, tuple[str, tuple[Atom, ...]]]
    outputs: tuple[Atom, ...]
    calls: dict[str, Callable]  # operations outside EXPRESSIONS, by name

    def __str__(self) -> str:
        lines = [f"{n} = {op}({', '.join(map(str, args))})" for n, (op, args) in self.ops.items()]
        return "\n".join([f"({', '.join(self.inputs)})", *lines, f"return {', '.join(map(str, self.outputs))}"])

    def select(self, outputs: Iterable[int]) -> Graph:
        """The graph that computes only some of the outputs."""
        builder = Builder(self.inputs)
        values = builder.inline(self, {})
        return builder.graph(values[i] for i in outputs)

    def only_in_torch(self) -> list[str]:
        """Operations that have no kernel expression: those outside the canonical ones, and powers to a variable."""
        foreign = {op for op, _ in self.ops.values() if op not in EXPRESSIONS}
        powers = {op for op, args in self.ops.values() if op == "pow" and not _is_const(args[1])}
        return sorted(foreign | powers)

    def compares(self, names: Iterable[str]) -> bool:
        """Whether it compares what depends on one of these inputs: there a result may jump."""
        moving = set(names)
        for name, (op, args) in self.ops.items():
            if any(isinstance(a, str) and a in moving for a in args):
                if op in _COMPARISONS:
                    return True
                moving.add(name)
        return False

    @property
    def sums(self) -> bool:
        """Whether it sums over the channels of heads."""
        return any(op == "total" for op, _ in self.ops.values())

    def instructions(self) -> int:
        """Roughly how many machine instructions of a GPU it takes."""
        return sum(_INSTRUCTIONS.get(op, 1) for op, _ in self.ops.values())

    def compile(self, dtype: torch.dtype) -> Callable[..., tuple]:
        """A Python function of the inputs that returns the outputs; intermediates are freed after their last use."""
        namespace = {"torch": torch, "_maximum": _maximum, "_minimum": _minimum, "_where": _where_for(dtype)}
        namespace |= {"_atan2": _of_tensors(torch.atan2, dtype), "_hypot": _of_tensors(torch.hypot, dtype)}
        last = {a: n for n, (_, args) in self.ops.items() for a in args if isinstance(a, str)}
        lines = []
        for k, (name, (op, args)) in enumerate(self.ops.items()):
            text = [repr(a) if not isinstance(a, float) or math.isfinite(a) else f"float('{a}')" for a in args]
            text = [a if isinstance(a, str) else t for a, t in zip(args, text, strict=True)]
            if op in EXPRESSIONS:
                expression = EXPRESSIONS[op].format(*text)
            else:
                namespace[f"_call{k}"] = self.calls[op]
                expression = f"_call{k}({', '.join(text)})"
            free = [
                a
                for a in dict.fromkeys(args)
                if isinstance(a, str) and last[a] == name and a in self.ops and a not in self.outputs
            ]
            lines.append(f"    {name} = {expression}" + (f"; del {', '.join(free)}" if free else ""))
        result = ", ".join(o if isinstance(o, str) else repr(o) for o in self.outputs)
        source = f"def graph({', '.join(self.inputs)}):\n" + "\n".join(lines) + f"\n    return ({result},)\n"
        exec(compile(source, "<parashoot graph>", "exec"), namespace)
        return namespace["graph"]


def _where_for(dtype: torch.dtype) -> Callable:
    def where(c: torch.Tensor, a: Any, b: Any) -> torch.Tensor:
        if _is_const(a) and _is_const(b):
            a = torch.tensor(a, dtype=torch.bool if isinstance(a, bool) and isinstance(b, bool) else dtype)
        return torch.where(c, a, b)

    return where


def _of_tensors(function: Callable, dtype: torch.dtype) -> Callable:
    def call(a: Any, b: Any) -> torch.Tensor:
        like = b if _is_const(a) else a
        return function(*(torch.tensor(v, dtype=dtype, device=like.device) if _is_const(v) else v for v in (a, b)))

    return call


def _evaluate(op: str, args: list[torch.Tensor]) -> torch.Tensor:
    namespace = {"torch": torch, "_maximum": torch.maximum, "_minimum": torch.minimum, "_where": torch.where}
    namespace |= {"_atan2": torch.atan2, "_hypot": torch.hypot}
    names = [f"a{i}" for i in range(len(args))]
    return eval(EXPRESSIONS[op].format(*names), namespace | dict(zip(names, args, strict=True)))


def interpret(
    module: torch.fx.GraphModule, given: Callable, constant: Callable, operation: Callable[[torch.fx.Node, list], Any]
) -> list[Any]:
    """What an FX graph returns, None where that is nothing, with other values in place of its tensors: `given(node)` for an input,
    `constant(tensor)` of one number, `operation(node, args)`. Raises `UnknownOperation` for a longer constant."""
    values: dict[torch.fx.Node, Any] = {}
    for node in module.graph.nodes:
        if node.op == "placeholder":
            values[node] = given(node)
        elif node.op == "get_attr":
            found = getattr(module, str(node.target))
            if found.numel() != 1:
                raise UnknownOperation("constant tensor", f"it holds {found.numel()} numbers, one per position")
            values[node] = constant(found)
        elif node.op == "output":
            return [values[o] if isinstance(o, torch.fx.Node) else None for o in node.args[0]]
        else:
            values[node] = operation(node, [values.get(a, a) if isinstance(a, torch.fx.Node) else a for a in node.args])
            if node.target._schema.is_mutable:  # decompositions overwrite their own temporaries
                values[node.args[0]] = values[node]
    raise AssertionError("an FX graph ends with an output node")


def from_fx(module: torch.fx.GraphModule, names: list[str]) -> Graph:
    """The canonical graph of an FX graph of elementwise operations on tensors that all have one shape.

    Raises `UnknownOperation`, whose arguments are the operation's name and why it is refused.
    """
    builder, inputs = Builder(names), iter(names)
    found = interpret(module, lambda node: next(inputs), torch.Tensor.item, partial(convert, builder))
    return builder.graph(0.0 if v is None else v for v in found)


def _dtype(value: Any) -> torch.dtype | None:
    """Of a node that is a tensor."""
    return getattr(value.meta.get("tensor_meta"), "dtype", None) if isinstance(value, torch.fx.Node) else None


def convert(builder: Builder, node: torch.fx.Node, args: list[Any]) -> Atom:
    """Append an elementwise operation of an FX graph. Raises `UnknownOperation` for others."""
    target: Any = node.target
    options: dict[str, Any] = dict(node.kwargs)
    name = target._schema.name.split("::")[1].rstrip("_")
    op = _RENAMED.get(name, name)
    add = builder.add
    kinds = [_dtype(a) for a in node.args]
    if op in _NUMBERS and _dtype(node) != torch.bool:  # a mask among numbers is one, for a sum of two is no "or"
        mask = {"where": 0, "masked_fill": 1}.get(op)
        args = [add("where", a, 1.0, 0.0) if kinds[k] == torch.bool and k != mask else a for k, a in enumerate(args)]
    if name.startswith("logical"):
        args = [a if kind in (None, torch.bool) else add("ne", a, 0.0) for a, kind in zip(args, kinds, strict=True)]
    if name == "copy":
        return args[1]
    if name in _ALIASES or (name in ("expand", "view") and _is_const(args[0])):
        return args[0]
    if name in ("full", "full_like", "new_full"):
        return args[2 if name == "new_full" else 1]
    if name.startswith(
        ("zeros", "new_zeros", "ones", "new_ones", "empty", "new_empty", "_new_zeros", "_efficientzero")
    ):
        return 1.0 if "ones" in name else 0.0
    if name == "scalar_tensor":
        return args[0]
    if name == "_to_copy":
        origin: Any = node.args[0]
        source, kind = origin.meta["tensor_meta"].dtype, options.get("dtype")
        if kind is None or kind == source:
            return args[0]
        if source == torch.bool and kind.is_floating_point:
            return add("where", args[0], 1.0, 0.0)
        raise UnknownOperation("dtype conversion", f"it turns {source} into {kind}")
    if name == "clamp":
        low, high = [*args, None, None][1:3]
        out = args[0] if low is None else add("maximum", args[0], low)
        return out if high is None else add("minimum", out, high)
    if name == "square":
        return add("mul", args[0], args[0])
    if name == "reciprocal":
        return add("div", 1.0, args[0])
    if name == "relu":
        return add("maximum", args[0], 0.0)
    if name == "gelu" and options.get("approximate", "none") == "none":
        normal = add("add", 1.0, add("erf", add("mul", args[0], math.sqrt(0.5))))
        return add("mul", add("mul", args[0], 0.5), normal)
    if name == "masked_fill":
        return add("where", args[1], args[2], args[0])
    if name == "pow" and args[1] == 2:
        return add("mul", args[0], args[0])
    if op in ("add", "sub") and node.kwargs.get("alpha", 1) != 1:
        return add(op, args[0], add("mul", args[1], node.kwargs["alpha"]))  # type: ignore[arg-type]
    if op in EXPRESSIONS and EXPRESSIONS[op].count("{}") == len(args) and not set(node.kwargs) - {"alpha"}:
        return add(op, *args)
    if torch.Tag.pointwise not in target.tags:
        raise UnknownOperation(str(target), "it is not elementwise")
    kwargs = dict(node.kwargs)
    label = str(target) + (str(kwargs) if kwargs else "")
    if any(not isinstance(a, (str, int, float)) for a in args):
        raise UnknownOperation(str(target), f"its argument list {node.args} is not supported")
    return add(label, *args, call=lambda *a, _op=target, _kw=kwargs: _op(*a, **_kw))
