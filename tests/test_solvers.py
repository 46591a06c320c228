"""Every shipped cell under every solver against a loop: states, final state and all gradients, with resets, both directions."""

import pytest
import torch

import parashoot as ps
from oracle import CELLS, by_loop, gradients, random_problem, random_resets, relative

SOLVERS = {
    "auto": None,
    "sequential": ps.Sequential(),
    "newton": ps.Newton(),
    "exact-8": ps.MultipleShooting(8),
    "diagonal-16": ps.MultipleShooting(16, jacobian="diagonal"),
    "zero-32": ps.MultipleShooting(32, jacobian="zero"),
}


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
@pytest.mark.parametrize("name", CELLS)
def test_agrees_with_the_loop(name: str, solver: ps.MultipleShooting | None, reverse: bool):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, 67, 8, sigma=0.7)
    reset = random_resets(2, 67, share=0.05)

    def run(x, params, h0):
        return ps.scan(cell, x, params or None, h0, reset=reset, reverse=reverse, solver=solver)

    want, h_want = by_loop(cell, reset, reverse)(x, params, h0)
    y, h_n = run(x, params, h0)
    assert relative(y, want) < 1e-10
    if not reverse:
        assert relative(h_n, h_want) < 1e-10
    dy = torch.randn_like(y)
    oracle = gradients(by_loop(cell, reset, reverse), x, params, h0, dy, None)
    for got, grad in zip(gradients(run, x, params, h0, dy, None), oracle, strict=True):
        assert relative(got, grad) < 1e-9


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chaotic_cell_ends_exactly_in_at_most_n_sweeps(dtype: torch.dtype):
    @ps.cell
    def logistic(h: ps.State, x: ps.Input, a: ps.Param):
        return a * h * (1 - h) + 0 * x

    x, a, h0 = (
        torch.zeros(1, 256, 1, 4, dtype=dtype),
        torch.full((1, 4), 3.9, dtype=dtype),
        torch.rand(1, 1, 4, dtype=dtype),
    )
    want = by_loop(logistic)(x, [a[0]], h0)[0]
    for chunk in (1, 8, 32):
        y, _, info = ps.scan(logistic, x, a, h0, solver=ps.MultipleShooting(chunk), return_info=True)
        assert torch.equal(y, want)
        assert info.iterations <= -(-256 // chunk)


@ps.cell(structure="headwise", width=4)
def normed(h: ps.State, x: ps.Input, p: ps.Param):
    u = torch.tanh(p * h + x)
    return u / (1 + u.square().sum(2, keepdim=True))


@ps.cell(structure="headwise", width=4)
def mixed(h: ps.State, x: ps.Input, R: ps.Param):
    return torch.tanh(torch.einsum("hij,bhj->bhi", R, h) + x)


@ps.cell(structure="dense")
def added(h: ps.State, x: ps.Input, W: ps.Param):
    return torch.tanh(torch.addmm(x, h, W.t()))


@ps.cell(structure="dense")
def chosen(h: ps.State, x: ps.Input, W: ps.Param):
    return torch.softmax(h @ W.mT + x, dim=1)


@ps.cell(structure="dense")
def counted(h: ps.State, n: ps.State, x: ps.Input, W: ps.Param, b: ps.Param):
    return torch.tanh(h @ W + x) * n, torch.sigmoid(b)  # a state that is the same for all


@pytest.mark.parametrize("solver", [None, ps.MultipleShooting(16)], ids=["auto", "16"])
@pytest.mark.parametrize("cell", [normed, mixed, added, chosen, counted], ids=lambda cell: cell.name)
def test_steps_may_count_their_axes_from_the_front(cell, solver):
    """As they do when they run on (B, H, n) or (B, C), whatever the chunks."""
    if cell is counted:  # of which vectors and matrices cannot be told
        x, params, h0 = random_problem(chosen, 2, 400, 8, sigma=0.5)
        params, h0 = [*params, torch.randn(8, dtype=x.dtype)], h0.repeat(1, 2, 1)
    else:
        x, params, h0 = random_problem(cell, 2, 400, 8, sigma=0.5)
    reset = random_resets(2, 400, share=0.01)
    run = lambda x, params, h0: ps.scan(cell, x, params, h0, reset=reset, solver=solver)
    want, _ = by_loop(cell, reset)(x, params, h0)
    y, _ = run(x, params, h0)
    assert relative(y, want) < 1e-10
    dy = torch.randn_like(y)
    oracle = gradients(by_loop(cell, reset), x, params, h0, dy, None)
    for got, grad in zip(gradients(run, x, params, h0, dy, None), oracle, strict=True):
        assert relative(got, grad) < 1e-9
