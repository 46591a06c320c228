"""From canonical graphs to Triton text: one line an operation, no knowledge of derivatives or of any cell."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from ..graph import Atom, Graph

EXPRESSIONS = {
    "add": "{} + {}", "sub": "{} - {}", "mul": "{} * {}", "div": "divided({}, {}, FAST)", "neg": "-{}",
    "lt": "{} < {}", "le": "{} <= {}", "gt": "{} > {}", "ge": "{} >= {}", "eq": "{} == {}", "ne": "{} != {}",
    "and": "{} & {}", "or": "{} | {}", "not": "~{}",
    "exp": "exp({}, FAST)", "expm1": "expm1({}, FAST)", "log": "log({}, FAST)", "log1p": "log1p({}, FAST)",
    "sin": "sin({}, FAST)", "cos": "cos({}, FAST)", "tanh": "tanh({}, FAST)", "sigmoid": "sigmoid({}, FAST)",
    "sqrt": "sqrt({}, FAST)", "rsqrt": "rsqrt({}, FAST)", "abs": "tl.abs({})", "sign": "sign({})",
    "maximum": "larger({}, {})", "minimum": "smaller({}, {})", "where": "tl.where({}, {}, {})",
    "erf": "erf({}, FAST)", "atan2": "atan2({}, {}, FAST)", "hypot": "hypot({}, {}, FAST)",
    "mix": "mixed({1}, {0}_t, inside, same, FAST, MASKED, APART)", "mix_t": "mixed({1}, {0}, inside, same, FAST, MASKED, APART)",
    "total": "totalled({}, inside, same, FAST, MASKED, APART)",
}  # fmt: skip


def power(name: str, base: str, exponent: float) -> list[str]:
    """name = base ** exponent for a constant exponent: an integer by repeated squaring."""
    n, square, factors, out = abs(exponent), base, [], []
    if not math.isfinite(n) or n != int(n):
        return [f"{name} = exp({exponent!r} * log({base}, FAST), FAST)"]
    n = int(n)
    while n:
        if n & 1:
            factors.append(square)
        n >>= 1
        if n:
            out.append(f"{name}_{len(out)} = {square} * {square}")
            square = f"{name}_{len(out) - 1}"
    product = " * ".join(factors) or "1.0"
    return [*out, f"{name} = {product}" if exponent > 0 else f"{name} = divided(1.0, {product}, FAST)"]


def atom(a: Atom) -> str:
    """A name, or a constant as a literal that Triton takes for fp32."""
    if isinstance(a, float) and not math.isfinite(a):
        return f'float("{a}")'
    if isinstance(a, float) and a != 0.0 and not 2**-126 <= abs(a) < 2**128:
        return f"tl.full([], {a!r}, tl.float32)"
    return a if isinstance(a, str) else repr(a)


def lines(graph: Graph) -> list[str]:
    """Assignments for all operations, in order."""
    out = []
    for name, (op, args) in graph.ops.items():
        if op == "pow":
            out += power(name, *args)  # type: ignore[arg-type]
        else:
            out.append(f"{name} = {EXPRESSIONS[op].format(*map(atom, args))}")
    return out


def function(name: str, graph: Graph, inputs: Iterable[str], flags: Sequence[str] = ("FAST",)) -> str:
    """A Triton function of `inputs` and constants `flags` that returns those outputs which are not constants, as a tuple."""
    results = dict.fromkeys(o for o in graph.outputs if isinstance(o, str))
    body = [*lines(graph), f"return {', '.join(results)}" if results else "return 0.0"]
    head = f"@triton.jit\ndef {name}({', '.join([*inputs, *(f'{flag}: tl.constexpr' for flag in flags)])}):\n"
    return head + "".join(f"    {line}\n" for line in body)


def call(
    name: str, graph: Graph, arguments: Iterable[str], prefix: str, flags: Sequence[str] = ("FAST",)
) -> tuple[str, list[Atom]]:
    """A line that calls such a function, and the graph's outputs in the caller's names: constants stay constants."""
    results = {o: f"{prefix}{k}" for k, o in enumerate(dict.fromkeys(o for o in graph.outputs if isinstance(o, str)))}
    line = f"{', '.join(results.values())} = {name}({', '.join([*arguments, *flags])})"
    return (line if results else ""), [results[o] if isinstance(o, str) else o for o in graph.outputs]


def dot(pairs: Iterable[tuple[Atom, str]]) -> str:
    """The sum of products as an expression; factors 0 and 1 vanish."""
    terms = [b if a == 1.0 else f"{atom(a)} * {b}" for a, b in pairs if a != 0.0]
    return " + ".join(terms) or "zero"
