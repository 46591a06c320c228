"""Random elementwise steps as real source: what the tests and benchmarks call the fuzzer's cells."""

import linecache
import random

import torch

import parashoot as ps

SEEDS = range(40)
UNARY = [  # bounded growth, so that random compositions stay finite
    "torch.tanh({})", "torch.sigmoid({})", "torch.exp(-torch.abs({}))", "torch.log1p({0} * {0})", "torch.sin({})", "torch.cos({})",
    "softplus({})", "torch.sqrt(1.0 + {0} * {0})", "torch.abs({})", "torch.erf({})", "torch.clamp({}, -0.8, 0.9)",
    "torch.clamp({}, min=-0.3)", "torch.exp(torch.clamp({}, max=1.0))", "-{}", "{} * {c}", "{} + {c}", "{c} - {}", "{}.square()",
    "torch.relu({})", "torch.rsqrt(1.0 + {0} * {0})", "torch.reciprocal(2.0 + torch.cos({}))", "torch.expm1(torch.clamp({}, max=1.0))",
    "logsigmoid({})", "silu({})", "gelu({})", "gain({})",
]  # fmt: skip
BINARY = [
    "{} + {}", "{} - {}", "{} * {}", "{} / (1.5 + torch.tanh({}))", "torch.maximum({}, {})", "torch.minimum({}, {})",
    "torch.where({0} > {1}, {0}, 0.5 * {1})", "torch.where({} < {c}, {}, {c})", "torch.lerp({}, {}, 0.3)",
    "torch.where(({0} > 0) & ({1} < 0.5), {0} * {1}, {1})", "torch.addcmul({0}, {0}, {1})", "torch.logaddexp({}, {})",
    "torch.hypot(1.0 + {0} * {0}, {1})", "torch.atan2({}, 1.5 + torch.cos({}))",
]  # fmt: skip


class Source:
    """A random step: its text, and the numbers of states, inputs and parameters."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.slots, self.inputs, self.params = (self.random.randint(*r) for r in ((1, 4), (1, 3), (0, 3)))
        self.names = [
            f"{role}{k}" for role, n in (("h", self.slots), ("x", self.inputs), ("p", self.params)) for k in range(n)
        ]
        roles = {"h": "State", "x": "Input", "p": "Param"}
        signature = ", ".join(f"{name}: ps.{roles[name[0]]}" for name in self.names)
        lines, known = [], list(self.names)
        for k in range(self.random.randint(1, 4)):  # shared subexpressions
            lines.append(f"    t{k} = {self.expression(2, known)}")
            known.append(f"t{k}")
        new = [f"torch.tanh(0.7 * ({self.expression(3, known)}) + 0.2 * h{i})" for i in range(self.slots)]
        lines.append(f"    return {', '.join(new)}")
        self.text = f"def fuzzed({signature}):\n" + "\n".join(lines) + "\n"

    def expression(self, depth, known):
        if depth == 0 or self.random.random() < 0.15:
            return self.random.choice(known)
        constant = f"{self.random.uniform(0.1, 1.2):.2f}"
        if self.random.random() < 0.4:
            pattern, arguments = self.random.choice(UNARY), [self.expression(depth - 1, known)]
        else:
            pattern, arguments = self.random.choice(BINARY), [self.expression(depth - 1, known) for _ in range(2)]
        return "(" + pattern.format(*(f"({a})" for a in arguments), c=constant) + ")"

    def cell(self, seed):
        """Compiled under a file name that linecache knows, with a closure of the seed's own."""
        scale = self.random.uniform(0.3, 0.9)
        file, functions = f"<fuzzed {seed}>", torch.nn.functional
        namespace = {"torch": torch, "ps": ps, "gain": lambda v: scale * v}
        namespace |= {name: getattr(functions, name) for name in ("softplus", "logsigmoid", "silu", "gelu")}
        linecache.cache[file] = (len(self.text), None, self.text.splitlines(True), file)
        exec(compile(self.text, file, "exec"), namespace)
        output = f"h{self.random.randrange(self.slots)}"
        return ps.cell(namespace["fuzzed"], output=output)
