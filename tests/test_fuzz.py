"""A fuzzer of cells: random elementwise steps as real source, held against eager, jacrev, the fp64 loop and its autograd."""

import linecache
import random

import pytest
import torch

import parashoot as ps
from oracle import by_loop, gradients, loop, relative
from parashoot.trace import trace

SEEDS, CHANNELS, TIME = range(40), 5, 24
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


@pytest.fixture(scope="module", params=SEEDS)
def problem(request):
    """(cell, source, x, params, h0) in fp64."""
    seed = request.param
    source = Source(seed)
    cell = source.cell(seed)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    params = [draw(CHANNELS) for _ in range(source.params)]
    return cell, source.text, draw(2, TIME, source.inputs, CHANNELS), params, draw(2, source.slots, CHANNELS)


def step(cell, states, inputs, params):
    out = cell.step(*states, *inputs, *params)
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def test_traced_is_eager_and_its_jacobian_is_jacrev(problem):
    cell, text, x, params, h0 = problem
    found = trace(cell, torch.float64, torch.device("cpu"), (CHANNELS,), ((CHANNELS,),) * len(params))
    states, inputs = h0.unbind(1), x[:, 0].unbind(1)
    slots = len(states)
    assert found.graph is not None
    new = found.graph.compile(torch.float64)(*states, *inputs, *params, *[None] * slots)[:slots]
    for got, want in zip(new, step(cell, states, inputs, params), strict=True):
        got = torch.as_tensor(got, dtype=torch.float64).expand_as(want)
        torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12, msg=lambda m: f"{text}\n{m}")
    entries = found.jacobian(states, inputs, params)
    for b in range(2):
        of_row = lambda h, b=b: torch.stack(step(cell, h.unbind(0), x[b, 0].unbind(0), params))
        want = torch.func.jacrev(of_row)(h0[b]).diagonal(dim1=1, dim2=3)  # (S, S, C): channels are independent
        torch.testing.assert_close(entries[:, :, b], want, rtol=1e-10, atol=1e-10, msg=lambda m: f"{text}\n{m}")


def test_shooting_is_the_loop(problem):
    cell, text, x, params, h0 = problem
    want = loop(cell, x, params, h0)
    for solver in (None, ps.Newton(), ps.MultipleShooting(7)):
        states, h_n = ps.scan(cell, x, tuple(params) or None, h0, solver=solver, return_states=True)
        assert float((states - want).abs().max()) <= 1e-9, text
        assert torch.equal(h_n, states[:, -1])


def test_gradients_are_autograds_through_the_loop(problem):
    cell, text, x, params, h0 = problem
    dy, dh = torch.randn(2, TIME, CHANNELS).double(), torch.randn(h0.shape).double()
    want = gradients(by_loop(cell), x, params, h0, dy, dh)
    for solver in (None, ps.MultipleShooting(7)):
        got = gradients(
            lambda x, p, h, s=solver: ps.scan(cell, x, tuple(p) or None, h, solver=s), x, params, h0, dy, dh
        )
        errors = [relative(g, w) for g, w in zip(got, want, strict=True)]
        assert max(errors) <= 1e-8, f"{errors}\n{text}"
