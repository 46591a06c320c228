"""The fuzzer's cells, held against eager, jacrev, the fp64 loop and its autograd."""

import pytest
import torch

import parashoot as ps
from fuzzer import SEEDS, Source
from oracle import by_loop, gradients, loop, relative
from parashoot.trace import trace

CHANNELS, TIME = 5, 24


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
