"""The canonical graph of a headwise step: elementwise operations, and products of a head's state with learned n x n matrices.

PyTorch writes `R h` in many ways (einsum, matmul, a broadcast product and a sum) and its derivative in as many. Here each tensor of
the trace is a sum of products of factors whose axes carry labels: rows, heads, and one label for every axis of length n. Views and
permutations move labels, a product unites them, and a sum over a label that a matrix and a vector share is one of two operations:

    mix(R, v)_i = sum_j R_ij v_j,    mix_t(R, g)_j = sum_i R_ij g_i

or, of a vector alone, total(v) = sum_j v_j, one number for a head.
A sum over rows is the gradient of a parameter: of a vector, sum_r g_ri; of a matrix, sums of outer products, sum_r g_ri v_rj.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import torch

from .graph import Atom, Builder, Graph, UnknownOperation, convert, interpret

Label = str | int  # "rows", "heads", or the number of an axis of length n
# A vector with its axis, a matrix with its two, a constant or a head's number with none.
Factor = tuple[Atom, tuple[Label, ...]]
_fresh = itertools.count()
_NOTHING: tuple[Factor, ...] = ((0.0, ()),)


@dataclass(frozen=True)
class Sizes:
    """Different sizes, none 1, for the axes of a trace: what tells labels apart."""

    rows: int
    heads: int
    width: int

    def label(self, size: int) -> tuple[Label, ...]:
        """The labels of an axis that appears from nowhere."""
        found = {1: (), self.rows: ("rows",), self.heads: ("heads",), self.width: (next(_fresh),)}
        found[self.rows * self.heads] = ("rows", "heads")
        if size not in found:
            raise UnknownOperation(
                "a tensor of another shape", f"an axis of {size} is neither rows, heads nor channels"
            )
        return found[size]

    def of(self, labels: Sequence[Label]) -> int:
        return math.prod({"rows": self.rows, "heads": self.heads}.get(str(label), self.width) for label in labels)


@dataclass(frozen=True)
class Value:
    """A sum of products. `dims`: the labels that each axis of the tensor holds, none for an axis of length 1; `summed` over rows."""

    dims: tuple[tuple[Label, ...], ...]
    terms: tuple[tuple[Factor, ...], ...]
    summed: bool = False

    def renamed(self, names: dict[Label, Label]) -> Value:
        new = lambda labels: tuple(names.get(label, label) for label in labels)
        terms = tuple(tuple((a, new(labels)) for a, labels in term) for term in self.terms)
        return replace(self, dims=tuple(map(new, self.dims)), terms=terms)


def from_fx(
    module: torch.fx.GraphModule, names: list[str], sizes: Sizes, matrices: set[str], outputs: list[str]
) -> tuple[Graph, list[int | None]]:
    """The canonical graph, and how many pairs (g, v) of outer products each output is; None for an output that is one value.

    `names` of the inputs, of which `matrices` are (H, n, n); `outputs` names what each output is the new value or the gradient of.
    Raises `UnknownOperation` where an operation is neither elementwise nor a product by a matrix.
    """
    reader, inputs = _Reader(Builder(names), sizes, matrices), iter(names)
    shaped = lambda node: reader.input(next(inputs), node.meta["tensor_meta"].shape)
    given = interpret(module, shaped, lambda v: reader.constant(v.item(), v.shape), reader.operation)
    values = [reader.value(0.0) if v is None else v for v in given]
    found = [reader.output(v, name in matrices) for v, name in zip(values, outputs, strict=True)]
    return reader.builder.graph(a for atoms, _ in found for a in atoms), [pairs for _, pairs in found]


class _Reader:
    def __init__(self, builder: Builder, sizes: Sizes, matrices: set[str]):
        self.builder, self.sizes, self.matrices = builder, sizes, matrices

    def input(self, name: str, shape: Sequence[int]) -> Value:
        dims = tuple(self.sizes.label(s) for s in shape)
        labels = tuple(label for dim in dims for label in dim if isinstance(label, int))
        return Value(dims, (((name, labels),),))

    def constant(self, value: Any, shape: Sequence[int]) -> Value:
        return Value(tuple(self.sizes.label(int(s)) for s in shape), (((value, ()),),))

    def output(self, v: Value, matrix: bool) -> tuple[list[Atom], int | None]:
        """The atoms of a state or gradient: one, or g and v of each outer product of a matrix's gradient."""
        own = [dim[0] for dim in v.dims if dim and isinstance(dim[0], int)]
        terms = [term for term in v.terms if term != _NOTHING]
        if not matrix:
            total: Atom = 0.0
            for term in terms:
                total = self.builder.add("add", total, self.atom(term, tuple(own[-1:])))
            return [total], None
        pairs: list[Atom] = []
        for term in terms:
            along = {labels[0]: a for a, labels in term if len(labels) == 1}
            if not v.summed or len(term) != 2 or set(along) != set(own):
                raise UnknownOperation("a matrix other than in products", "it is not a sum of outer products")
            pairs += [along[label] for label in own]
        return pairs, len(terms)

    def atom(self, term: tuple[Factor, ...], along: tuple[Label, ...]) -> Atom:
        """A term that is one value: a vector along an axis, a head's number, or a constant."""
        if len(term) == 1 and term[0][0] not in self.matrices and term[0][1] in ((), along):
            return term[0][0]
        raise UnknownOperation(
            "a product along two axes of a head", "it joins two axes of a head and is not summed over one"
        )

    def operation(self, node: torch.fx.Node, args: list[Any]) -> Value:
        name = node.target._schema.name.split("::")[1].rstrip("_")  # type: ignore[union-attr]
        shape = node.meta["tensor_meta"].shape
        first = args[0] if args and isinstance(args[0], Value) else None
        if name == "copy":
            return args[1]
        if first is not None and name in ("alias", "clone", "detach", "lift_fresh_copy", "lift_fresh", "contiguous"):
            return first
        if first is not None and name in _VIEWS:
            return replace(first, dims=_VIEWS[name](self, first, args, shape))
        if name == "mul":
            return self.product(*map(self.value, args))
        if name in ("bmm", "mm"):
            a, b = args
            left, right = replace(a, dims=(*a.dims, ())), replace(b, dims=(*b.dims[:-2], (), *b.dims[-2:]))
            return self.sum(self.product(left, right), len(left.dims) - 2, False)
        if name in ("sum", "mean"):
            if first is None or len(args) < 2 or not args[1]:
                self.refuse(node)
            number = 1
            for axis in sorted((d % len(first.dims) for d in args[1]), reverse=True):
                number *= self.sizes.of(first.dims[axis])
                first = self.sum(first, axis, len(args) > 2 and args[2])
            return first if name == "sum" else self.product(first, self.value(1 / number))
        if first is not None and first.summed:
            return self.linear(node, name, args)
        if name == "arange" and tuple(shape) == (1,):
            return self.constant(0.0, shape)
        return self.elementwise(node, args, shape)

    def value(self, a: Any) -> Value:
        return a if isinstance(a, Value) else Value((), (((a, ()),),))

    def aligned(self, values: Sequence[Value]) -> tuple[tuple[tuple[Label, ...], ...], list[Value]]:
        """The axes of a broadcast result, and the values with the labels of those axes."""
        dims: list[tuple[Label, ...]] = []
        out = []
        for v in values:
            dims = [()] * (len(v.dims) - len(dims)) + dims
            names: dict[Label, Label] = {x: next(_fresh) for dim in v.dims for x in dim if isinstance(x, int)}
            for k, own in enumerate(v.dims, len(dims) - len(v.dims)):
                if own and not dims[k]:
                    dims[k] = tuple(names.get(x, x) for x in own)
                elif own:
                    names |= zip(own, dims[k], strict=True)
            out.append(v.renamed(names))
        return tuple(dims), out

    def product(self, *values: Value) -> Value:
        dims, (a, b) = self.aligned(values)
        return Value(dims, tuple(self.joined(s + t) for s in a.terms for t in b.terms), a.summed or b.summed)

    def joined(self, factors: tuple[Factor, ...]) -> tuple[Factor, ...]:
        """Vectors along the same axis, and what has no axis, multiplied together."""
        matrices = [f for f in factors if f[0] in self.matrices]
        vectors: dict[tuple[Label, ...], Atom] = {}
        constant: Atom = 1.0
        for a, labels in factors:
            if not labels:
                constant = self.builder.add("mul", constant, a)
                if constant == 0.0:
                    return _NOTHING
            elif a not in self.matrices:
                vectors[labels] = self.builder.add("mul", vectors[labels], a) if labels in vectors else a
        if vectors:
            first = next(iter(vectors))
            vectors[first] = self.builder.add("mul", vectors[first], constant)
        elif not matrices:
            return ((constant, ()),)
        elif constant != 1.0:
            raise UnknownOperation("a scaled matrix", "only products by parameters themselves are read")
        return (*matrices, *((a, labels if isinstance(a, str) else ()) for labels, a in vectors.items()))

    def sum(self, v: Value, axis: int, keep: bool) -> Value:
        dims = (*v.dims[:axis], *([()] if keep else []), *v.dims[axis + 1 :])
        for label in v.dims[axis]:
            if label == "rows":
                v = replace(v, summed=True)
            elif label == "heads":
                raise UnknownOperation("a sum over heads", "heads are apart")
            else:
                v = replace(v, terms=tuple(self.contracted(term, label) for term in v.terms))
        return replace(v, dims=dims)

    def contracted(self, term: tuple[Factor, ...], label: Label) -> tuple[Factor, ...]:
        if term == _NOTHING:
            return term
        matrix = [f for f in term if f[0] in self.matrices and label in f[1]]
        vector = [f for f in term if f[0] not in self.matrices and label in f[1]]
        if not matrix and len(vector) <= 1:
            rest = tuple(f for f in term if f not in vector)
            whole = self.builder.add("total", vector[0][0]) if vector else float(self.sizes.width)
            return self.joined((*rest, (whole, ())))
        if len(matrix) != 1 or len(vector) != 1:
            raise UnknownOperation("a sum over the channels of a head", "it is no product by a matrix")
        (name, (i, j)), (v, _) = matrix[0], vector[0]
        mixed = self.builder.add("mix" if label == j else "mix_t", name, v)
        rest = tuple(f for f in term if f not in (matrix[0], vector[0]))
        return self.joined((*rest, (mixed, (i if label == j else j,))))

    def linear(self, node: torch.fx.Node, name: str, args: list[Any]) -> Value:
        """What is added up, changes its sign or is divided after a sum over rows."""
        values = [self.value(a) for a in args]
        if name == "neg":
            return self.product(values[0], self.value(-1.0))
        if name == "div" and not values[1].summed and len(values[1].terms) == 1 == len(values[1].terms[0]):
            (((divisor, labels),),) = values[1].terms
            if divisor not in self.matrices:
                inverse = ((self.builder.add("div", 1.0, divisor), labels),)
                return self.product(values[0], replace(values[1], terms=(inverse,)))
        if name != "add" or node.kwargs.get("alpha", 1) != 1 or not all(v.summed for v in values):
            self.refuse(node)
        dims, values = self.aligned(values)
        return Value(dims, tuple(term for v in values for term in v.terms), True)

    def elementwise(self, node: torch.fx.Node, args: list[Any], shape: Sequence[int]) -> Value:
        given = [a for a in args if isinstance(a, Value)]
        dims, given = self.aligned(given)
        if any(len(v.terms) != 1 or v.summed for v in given):
            self.refuse(node)
        along = tuple({x for v in given for _, own in v.terms[0] for x in own})
        if len(along) > 1:
            self.refuse(node)
        atoms = iter(self.atom(v.terms[0], along) for v in given)
        result = convert(self.builder, node, [next(atoms) if isinstance(a, Value) else a for a in args])
        return Value(dims, (((result, along),),)) if isinstance(result, str) else self.constant(result, shape)

    def refuse(self, node: torch.fx.Node) -> NoReturn:
        raise UnknownOperation(str(node.target), "it is neither elementwise nor a sum or product by a matrix")


# Views: where the labels of each axis go.


def _view(reader: _Reader, v: Value, args: list[Any], shape: Sequence[int]) -> tuple[tuple[Label, ...], ...]:
    labels = [label for dim in v.dims for label in dim]
    out = []
    for size in shape:
        dim: list[Label] = []
        while labels and reader.sizes.of(dim) < size:
            dim.append(labels.pop(0))
        if reader.sizes.of(dim) != size:
            raise UnknownOperation("a view across heads", "it cuts an axis of a head")
        out.append(tuple(dim))
    return tuple(out)


def _permute(reader: _Reader, v: Value, args: list[Any], shape: Sequence[int]) -> tuple[tuple[Label, ...], ...]:
    return tuple(v.dims[k] for k in args[1])


def _expand(reader: _Reader, v: Value, args: list[Any], shape: Sequence[int]) -> tuple[tuple[Label, ...], ...]:
    old = [()] * (len(shape) - len(v.dims)) + list(v.dims)
    return tuple(dim or reader.sizes.label(size) for dim, size in zip(old, shape, strict=True))


def _squeeze(reader: _Reader, v: Value, args: list[Any], shape: Sequence[int]) -> tuple[tuple[Label, ...], ...]:
    axes = [args[1]] if isinstance(args[1], int) else args[1]
    gone = {k % len(v.dims) for k in axes}
    return tuple(dim for k, dim in enumerate(v.dims) if k not in gone or dim)


def _unsqueeze(reader: _Reader, v: Value, args: list[Any], shape: Sequence[int]) -> tuple[tuple[Label, ...], ...]:
    at = args[1] % (len(v.dims) + 1)
    return (*v.dims[:at], (), *v.dims[at:])


def _select(reader: _Reader, v: Value, args: list[Any], shape: Sequence[int]) -> tuple[tuple[Label, ...], ...]:
    at = args[1] % len(v.dims)
    if v.dims[at]:
        raise UnknownOperation("a part of a head", "it takes one channel, head or row")
    return (*v.dims[:at], *v.dims[at + 1 :])


_VIEWS: dict[str, Callable[..., tuple[tuple[Label, ...], ...]]] = {
    "view": _view, "_unsafe_view": _view, "reshape": _view, "permute": _permute, "expand": _expand, "squeeze": _squeeze,
    "unsqueeze": _unsqueeze, "select": _select,
}  # fmt: skip
