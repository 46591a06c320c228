"""Chunks that agree because all of it is small: what a cell makes of that later counts, against the fp64 loop."""

from typing import Any

import pytest
import torch

import parashoot as ps
from oracle import by_loop, loop


@ps.cell(structure="dense")
def dense(h: ps.State, x: ps.Input, W: ps.Param):
    return torch.tanh(h @ W.T + x)


@ps.cell(structure="headwise", width=4)
def heads(h: ps.State, x: ps.Input, W: ps.Param):
    return torch.tanh(torch.einsum("hij,...hj->...hi", W, h) + x)


def growing(cell: ps.Cell, rate: float) -> torch.Tensor:
    """A matrix that makes small states grow by `rate` a step."""
    return rate * (torch.eye(8) if cell is dense else torch.eye(4).repeat(2, 1, 1))


SOLVERS = [
    None,
    ps.MultipleShooting(),
    ps.MultipleShooting(64, jacobian="zero"),
    ps.MultipleShooting(64, jacobian="diagonal"),
]


@pytest.mark.parametrize("solver", SOLVERS, ids=["default", "shooting", "zero", "diagonal"])
@pytest.mark.parametrize("cell", [dense, heads], ids=lambda c: c.name)
def test_a_small_state_may_grow(cell, solver):
    W, x, h0 = growing(cell, 1.05), torch.zeros(1, 2048, 1, 8), torch.full((1, 1, 8), 1e-10)
    want = loop(cell, x.double(), [W.double()], h0.double())[:, :, 0]
    assert float(want[0, -1, 0]) > 0.3
    torch.testing.assert_close(ps.scan(cell, x, [W], h0, solver=solver)[0].double(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("solver", SOLVERS, ids=["default", "shooting", "zero", "diagonal"])
@pytest.mark.parametrize("cell", [dense, heads], ids=lambda c: c.name)
def test_a_small_gradient_may_grow(cell, solver):
    W, x, found = growing(cell, 1.05), torch.zeros(1, 1024, 1, 8), []
    plain = lambda x, params, h0: by_loop(cell)(x.double(), [p.double() for p in params], h0.double())
    for run in (lambda *given: ps.scan(cell, *given, solver=solver), plain):
        h0 = torch.zeros(1, 1, 8, requires_grad=True)
        y = run(x, [W], h0)[0]
        (y[:, 0].sum() + 1e-10 * y[:, -1].sum()).backward()
        found.append(h0.grad)
    torch.testing.assert_close(*found, rtol=1e-4, atol=0.0)


def test_small_inputs_add_up():
    x = torch.full((1, 65536, 1, 8), 1e-9)
    y, _ = ps.scan(dense, x, [torch.eye(8)])
    assert float(y[0, -1, 0]) == pytest.approx(6.5536e-5, rel=1e-3)


def test_a_module_of_pytorch_over_chunks_grows_too():
    module = torch.nn.RNN(8, 8, bias=False, batch_first=True)
    with torch.no_grad():
        weight: Any = module.weight_hh_l0
        weight.copy_(1.05 * torch.eye(8))
        given = torch.zeros(1, 4096, 8), torch.full((1, 1, 8), 1e-10)
        want = module(*given)[0]
        torch.testing.assert_close(ps.parallelize(module)(*given)[0], want, rtol=1e-4, atol=1e-6)


def test_a_cell_that_forgets_takes_no_more_sweeps():
    x, W = torch.randn(1, 2048, 1, 8), 0.5 * torch.eye(8)
    _, _, info = ps.scan(dense, x, [W], solver=ps.MultipleShooting(64, jacobian="zero"), return_info=True)
    assert info.iterations == 2
