"""Gradients three ways: the adjoint, backpropagation through the fp64 loop, and finite differences (gradcheck)."""

import pytest
import torch

import parashoot as ps
from oracle import CELLS, ONE_OF_EACH, by_loop, gradients, leaves, loop, random_problem, random_resets, relative

SOLVERS = {
    "auto": None, "loop": ps.Sequential(), "newton": ps.Newton(), "9": ps.MultipleShooting(9),
    "diagonal": ps.MultipleShooting(8, jacobian="diagonal"), "zero": ps.MultipleShooting(16, jacobian="zero"),
}  # fmt: skip
every_cell = pytest.mark.parametrize("name", CELLS)
every_structure = pytest.mark.parametrize("structure", ONE_OF_EACH)
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
reverses = pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])


def by_scan(cell, **options):
    return lambda x, params, h0: ps.scan(cell, x, tuple(params) or None, h0, **options)


def cotangent(*shape, seed=3):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def assert_same(cell, got, want, rtol=1e-9):
    for what, g, w in zip(["x", *cell.params, "h0"], got, want, strict=True):
        assert g.shape == w.shape
        assert relative(g, w) <= rtol, f"gradient by {what} is off by {relative(g, w):.2g}"


@every_cell
@solvers
@reverses
@pytest.mark.parametrize("what", ["dy", "dh_n", "both"])
def test_adjoint_is_backpropagation_through_the_loop(name, solver, reverse, what):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, 43, 8)
    reset = random_resets(2, 43, share=0.04)
    dy = None if what == "dh_n" else cotangent(2, 43, 8)
    dh = None if what == "dy" else cotangent(*h0.shape)
    want = gradients(by_loop(cell, reset, reverse), x, params, h0, dy, dh)
    got = gradients(by_scan(cell, reset=reset, reverse=reverse, solver=solver), x, params, h0, dy, dh)
    assert_same(cell, got, want)


@every_cell
@pytest.mark.parametrize("time", [1, 2, 9, 10, 65])
@pytest.mark.parametrize(
    "solver",
    [ps.MultipleShooting(9), ps.MultipleShooting(9, jacobian="zero"), ps.Newton()],
    ids=["9", "zero", "newton"],
)
def test_all_states_can_carry_a_gradient(name, time, solver):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, time, 8, seed=1)
    d_states, dh = cotangent(2, time, *h0.shape[1:]), cotangent(*h0.shape)

    def states_by_loop(x, params, h0):
        states = loop(cell, x, params, h0)
        return states, states[:, -1]

    want = gradients(states_by_loop, x, params, h0, d_states, dh)
    got = gradients(by_scan(cell, solver=solver, return_states=True), x, params, h0, d_states, dh)
    assert_same(cell, got, want)


@every_cell
@reverses
def test_gradcheck(name, reverse):
    cell = CELLS[name].with_width(2) if CELLS[name].width else CELLS[name]
    x, params, h0 = random_problem(cell, 1, 7, 2, sigma=0.7, seed=2)
    reset = torch.zeros(1, 7, dtype=torch.bool)
    reset[0, 5] = True

    def run(x, h0, *params):
        return ps.scan(
            cell, x, params or None, h0, reset=reset, reverse=reverse, solver=ps.MultipleShooting(3, tol=0.0)
        )

    torch.autograd.gradcheck(run, leaves(x, h0, *params), eps=1e-6, atol=1e-7, rtol=1e-5, nondet_tol=0.0)


@every_cell
def test_no_gradient_crosses_a_reset(name):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 1, 40, 8)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 21] = True
    dy = cotangent(1, 40, 8)
    dy[:, :21] = 0.0
    for solver in (ps.MultipleShooting(6), ps.MultipleShooting(6, jacobian="zero"), ps.Newton()):
        got = gradients(by_scan(cell, reset=reset, solver=solver), x, params, h0, dy, None)
        assert bool((got[0][:, :21] == 0).all()) and bool((got[-1] == 0).all())
        assert bool((got[0][:, 21:] != 0).any())


@every_structure
@reverses
@pytest.mark.parametrize("at", [0, 1, 41, 42])
@pytest.mark.parametrize("jacobian", ["exact", "zero"])
def test_a_reset_at_the_edge_of_a_part_chunk(structure, reverse, at, jacobian):
    """The last chunk is filled up with repeated steps; a reset among them must not cut the final state's gradient."""
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 43, 8)
    reset = torch.zeros(2, 43, dtype=torch.bool)
    reset[0, at] = True
    dh = cotangent(*h0.shape)
    run = by_scan(cell, reset=reset, reverse=reverse, solver=ps.MultipleShooting(9, jacobian=jacobian))
    assert_same(
        cell, gradients(run, x, params, h0, None, dh), gradients(by_loop(cell, reset, reverse), x, params, h0, None, dh)
    )


@every_cell
@pytest.mark.parametrize(
    "solver",
    [ps.Sequential(), ps.MultipleShooting(7), ps.MultipleShooting(7, jacobian="zero")],
    ids=["loop", "7", "zero"],
)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_a_nan_does_not_reach_gradients_before_a_reset(name, solver, where):
    """A reset is a select in both directions, so the documents before it train on, whatever comes after."""
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 1, 40, 8)
    reset = torch.zeros(1, 40, dtype=torch.bool)
    reset[0, 20] = True
    dy, dh = cotangent(1, 40, 8), cotangent(*h0.shape)
    clean = gradients(by_loop(cell, reset), x, params, h0, dy, dh)
    (x if where == "x" else dy.unsqueeze(2))[0, 30, 0, 2] = float("nan")
    by_the_loop = gradients(by_loop(cell, reset), x, params, h0, dy, dh)
    torch.testing.assert_close(by_the_loop[0][:, :20], clean[0][:, :20])
    got = gradients(by_scan(cell, reset=reset, solver=solver), x, params, h0, dy, dh)
    torch.testing.assert_close(got[0][:, :20], clean[0][:, :20])
    torch.testing.assert_close(got[-1], clean[-1])
    if cell.structure == "channelwise":
        torch.testing.assert_close(got[0][..., 3:], clean[0][..., 3:])


@ps.cell
def linear(h: ps.State, x: ps.Input, a: ps.Param):
    return a * h + x


@ps.cell(structure="headwise", width=4)
def linear_heads(h: ps.State, x: ps.Input, A: ps.Param):
    return torch.einsum("hij,...hj->...hi", A, h) + x


@ps.cell(structure="dense")
def linear_dense(h: ps.State, x: ps.Input, A: ps.Param):
    return h @ A.mT + x


@pytest.mark.parametrize("cell", [linear, linear_heads, linear_dense], ids=lambda c: c.name)
@pytest.mark.parametrize(
    "solver",
    [ps.MultipleShooting(32), ps.MultipleShooting(50), ps.MultipleShooting(32, jacobian="zero")],
    ids=["32", "50", "zero"],
)
def test_an_overflowing_chunk_product_falls_back_to_exact_steps(cell, solver):
    """50^32 is no fp32 number, but gradients of a loss on the first ten steps are."""
    eye = {"linear": torch.ones(8), "linear_heads": torch.eye(4).expand(2, 4, 4), "linear_dense": torch.eye(8)}[
        cell.name
    ]
    params, x, h0 = [50.0 * eye], torch.zeros(1, 96, 1, 8), torch.zeros(1, 1, 8)
    x[:, 5] = 1e-3
    x[:, 6] = -50e-3  # back to zero
    dy = torch.zeros(1, 96, 8)
    dy[:, :10] = cotangent(1, 10, 8).float()
    dh = torch.zeros_like(h0)
    want = gradients(by_loop(cell), x.double(), [p.double() for p in params], h0.double(), dy.double(), dh.double())
    got = gradients(by_scan(cell, solver=solver), x, params, h0, dy, dh)
    assert all(bool(torch.isfinite(w).all()) for w in want)
    assert_same(cell, got, want, rtol=1e-5)


def graph_size(*outputs):
    seen, todo = set(), [v.grad_fn for v in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return len(seen)


@every_structure
def test_the_graph_holds_one_node_whatever_the_length_and_sweeps(structure):
    cell, sizes = ONE_OF_EACH[structure], set()
    for time, solver in ((4, ps.MultipleShooting(2)), (40, ps.Newton()), (120, ps.MultipleShooting(10))):
        x, params, h0 = random_problem(cell, 1, time, 8)
        x, h0, *params = leaves(x, h0, *params)
        y, h_n = ps.scan(cell, x, tuple(params), h0, solver=solver)
        assert y.grad_fn is h_n.grad_fn, "the operator's own node"
        sizes.add(graph_size(y, h_n))
    assert sizes == {1 + 2 + len(params)}, "that node and the leaves"


@every_structure
def test_only_what_needs_a_gradient_gets_one(structure):
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 20, 8)
    want = gradients(by_loop(cell), x, params, h0, torch.ones(2, 20, 8).double(), None)
    for k, leaf in enumerate([x, *params, h0]):
        leaf.requires_grad_()
        y, h_n = ps.scan(cell, x, tuple(params), h0)
        assert relative(torch.autograd.grad(y.sum(), leaf)[0], want[k]) <= 1e-9
        leaf.requires_grad_(False)
    y, h_n = ps.scan(cell, x, tuple(params), h0)
    assert not y.requires_grad and not h_n.requires_grad


@every_structure
def test_gradients_by_stacked_parameters_and_expanded_inputs(structure):
    """Autograd adds up what was expanded, and (P, C) parameters get a (P, C) gradient."""
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 3, 20, 8)
    dy = cotangent(3, 20, 8)
    expand = lambda run: lambda x, p, h: run(x.expand(3, 20, -1, 8), p, h.expand(3, -1, -1))
    want = gradients(expand(by_loop(cell)), x[:1, :1], params, h0[:1], dy, None)
    assert_same(cell, gradients(expand(by_scan(cell)), x[:1, :1], params, h0[:1], dy, None), want)
    if structure == "channelwise":
        stacked = torch.stack(params).requires_grad_()
        (got,) = torch.autograd.grad((ps.scan(cell, x, stacked, h0)[0] * dy).sum(), stacked)
        assert relative(got, torch.stack(gradients(by_loop(cell), x, params, h0, dy, None)[1:-1])) <= 1e-9


@ps.cell(structure="headwise", width=4)
def by_matmul(h: ps.State, x: ps.Input, R: ps.Param):
    return torch.tanh((R @ h.unsqueeze(-1)).squeeze(-1) + x)


@ps.cell(structure="headwise", width=4)
def by_row(h: ps.State, x: ps.Input, R: ps.Param):
    return torch.tanh((h.unsqueeze(-2) @ R.flatten(1).unflatten(-1, (4, 4))).squeeze(-2) + x)


@solvers
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("cell", [by_matmul, by_row], ids=lambda cell: cell.name)
def test_a_step_may_view_what_it_is_given(cell, batch, solver):
    """Slices of chunks lie apart in memory, and so may parameters."""
    x = cotangent(batch, 60, 1, 8)
    found = []
    for run in (by_scan(cell, solver=solver), by_loop(cell)):
        base = (1.1 * torch.linalg.qr(cotangent(2, 4, 4, seed=5))[0]).requires_grad_()
        y = run(x, [base.mT], torch.zeros(batch, 1, 8, dtype=torch.float64))[0]
        found.append(torch.autograd.grad(y.sin().sum(), base)[0])
    assert relative(*found) < 1e-9
