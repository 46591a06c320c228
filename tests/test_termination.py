"""Finite termination: n chunks need at most n sweeps, for any step and any Jacobian, and the answer is the loop's."""

import dataclasses

import pytest
import torch

import parashoot as ps
from oracle import CELLS, by_loop, gradients, loop, random_problem, relative, step
from parashoot.solve import shooting


@ps.cell
def logistic(h: ps.State, x: ps.Input):
    return x * h * (1.0 - h)


@ps.cell
def henon(a: ps.State, b: ps.State, u: ps.Input, v: ps.Input):
    return b + 1.0 - u * a * a, v * a


@ps.cell
def square(h: ps.State, x: ps.Input):
    return h * h + x


@ps.cell
def square_minus(h: ps.State, x: ps.Input, w: ps.Param):
    return h * h - w * h * h * h + x  # inf - inf: ends in NaN


@ps.cell
def coupled(a: ps.State, b: ps.State, u: ps.Input, w: ps.Param):
    return torch.tanh(3.0 * w * b - 2.0 * a + u), torch.tanh(3.0 * a * w + b * a - u)


@ps.cell
def growth(h: ps.State, x: ps.Input, w: ps.Param):
    return torch.exp(w * h) + x


def uniform(low, high, *shape, seed=0):
    return low + (high - low) * torch.rand(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


TIME, BATCH, CHANNELS = 150, 2, 5
PROBLEMS = {  # + - * only, so that every order of the same operations gives the same bits
    "logistic": (logistic, [(3.8, 4.0)], 0, (0.2, 0.8)),
    "henon": (henon, [(1.3, 1.4), (0.25, 0.3)], 0, (-0.1, 0.1)),
    "square": (square, [(0.2, 1.0)], 0, (-0.5, 0.5)),
    "square_minus": (square_minus, [(0.2, 1.0)], 1, (3.0, 4.0)),
}
TRANSCENDENTAL = {
    "coupled": (coupled, [(-0.5, 0.5)], 1, (-0.5, 0.5)),
    "growth": (growth, [(-0.5, 0.5)], 1, (-0.5, 0.5)),
}
exact_problems = pytest.mark.parametrize("name", PROBLEMS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
jacobians = pytest.mark.parametrize("jacobian", ["exact", "diagonal", "zero"])
lengths = pytest.mark.parametrize("length", [1, 7, 50])


def build(name, dtype):
    cell, inputs, params, start = (PROBLEMS | TRANSCENDENTAL)[name]
    x = torch.stack([uniform(*r, BATCH, TIME, CHANNELS, seed=k) for k, r in enumerate(inputs)], 2).to(dtype)
    weights = [uniform(0.8, 1.2, CHANNELS, seed=9).to(dtype) for _ in range(params)]
    return cell, x, weights, uniform(*start, BATCH, len(cell.states), CHANNELS, seed=8).to(dtype)


def same_bits(got, want):
    return bool(((got == want) | (got.isnan() & want.isnan())).all())


@exact_problems
@dtypes
def test_the_problems_are_chaotic_or_overflow(name, dtype):
    cell, x, params, h0 = build(name, dtype)
    states = loop(cell, x, params, h0)
    if name in ("logistic", "henon"):
        nudged = loop(cell, x, params, h0 + 1e-6)
        assert float((nudged - states)[:, -20:].abs().max()) > 0.1
    else:
        assert not bool(torch.isfinite(states[:, -1]).all())


@exact_problems
@dtypes
@jacobians
@lengths
def test_the_loops_bits_in_at_most_n_sweeps(name, dtype, jacobian, length):
    cell, x, params, h0 = build(name, dtype)
    solver = ps.MultipleShooting(length, tol=0.0, jacobian=jacobian)
    states, h_n, info = ps.scan(cell, x, params or None, h0, solver=solver, return_states=True, return_info=True)
    want = loop(cell, x, params, h0)
    assert same_bits(states, want)
    assert same_bits(h_n, want[:, -1])
    assert info.iterations <= -(-TIME // length)
    assert info.defect == 0.0
    assert ps.scan(cell, x, params or None, h0, solver=dataclasses.replace(solver, max_iters=-(-TIME // length)))


@pytest.mark.parametrize("name", TRANSCENDENTAL)
@dtypes
@jacobians
@lengths
def test_a_step_of_library_functions_ends_on_a_trajectory_of_the_step(name, dtype, jacobian, length):
    """Vectorised tanh and exp round differently with the shape, and chaos amplifies that; each single step must still hold."""
    cell, x, params, h0 = build(name, dtype)
    solver = ps.MultipleShooting(length, tol=0.0, jacobian=jacobian)
    states, h_n, info = ps.scan(cell, x, params, h0, solver=solver, return_states=True, return_info=True)
    before = torch.cat([h0[:, None], states[:, :-1]], 1)
    again = torch.stack([step(cell, before[:, t], x[:, t], params) for t in range(TIME)], 1)
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(states, again, rtol=16 * eps, atol=16 * eps, equal_nan=True)
    torch.testing.assert_close(
        states[:, :4], loop(cell, x, params, h0)[:, :4], rtol=1e4 * eps, atol=1e4 * eps, equal_nan=True
    )
    assert info.iterations <= -(-TIME // length)
    assert same_bits(h_n, states[:, -1])


@pytest.mark.parametrize("name", ["logistic", "henon", "square"])
@dtypes
def test_default_tolerance_holds_at_every_boundary(name, dtype):
    cell, x, params, h0 = build(name, dtype)
    states, _, info = ps.scan(
        cell, x, params or None, h0, solver=ps.MultipleShooting(10), return_states=True, return_info=True
    )
    before = torch.cat([h0[:, None], states[:, :-1]], 1)
    again = torch.stack([step(cell, before[:, t], x[:, t], params) for t in range(TIME)], 1)
    tol = {torch.float32: 1e-6, torch.float64: 1e-12}[dtype]
    scale = 25  # the step after a boundary multiplies the defect by the step's Jacobian, below 20 for states below 10
    calm = torch.isfinite(again) & (again.abs() < 10)
    assert float((states - again)[calm].abs().max()) <= tol * scale
    assert torch.equal(states.isnan(), again.isnan())
    assert info.iterations <= 15


@pytest.fixture
def poison(monkeypatch):
    """A function that makes every forward pass use garbage of some kind for the step Jacobians."""
    true = shooting.Steps.jacobians
    generator = torch.Generator().manual_seed(5)

    def install(kind):
        def jacobians(self, previous, window):
            like = true(self, previous, window)
            noise = torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)
            if kind in ("random", "huge"):
                return noise * (3.0 if kind == "random" else torch.finfo(like.dtype).max)
            return torch.where(noise > 0.5, float(kind), noise)

        monkeypatch.setattr(shooting.Steps, "jacobians", jacobians)

    return install


@pytest.mark.parametrize("kind", ["random", "huge", "nan", "inf"])
@pytest.mark.parametrize("name", ["logistic", "henon", "square"])
@dtypes
@pytest.mark.parametrize("length", [1, 9])
def test_a_wrong_jacobian_still_gives_the_loops_bits_in_n_sweeps(poison, kind, name, dtype, length):
    poison(kind)
    cell, x, params, h0 = build(name, dtype)
    n = -(-TIME // length)
    solver = ps.MultipleShooting(length, tol=0.0, max_iters=n)
    states, _, info = ps.scan(cell, x, params or None, h0, solver=solver, return_states=True, return_info=True)
    assert same_bits(states, loop(cell, x, params, h0))
    assert info.iterations <= n


@pytest.mark.parametrize("kind", ["random", "nan"])
@pytest.mark.parametrize("name", ["elman", "headgru"])
def test_a_wrong_matrix_jacobian_still_gives_the_loops_answer(poison, kind, name):
    poison(kind)
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, 60, 8)
    y, _, info = ps.scan(cell, x, tuple(params), h0, solver=ps.MultipleShooting(5), return_info=True)
    torch.testing.assert_close(y, loop(cell, x, params, h0)[:, :, cell.output], rtol=0, atol=1e-10)
    assert info.iterations <= 12


@pytest.mark.parametrize("jacobian", ["exact", "zero", "random", "nan"])
def test_after_k_sweeps_the_first_k_chunks_are_exact(poison, monkeypatch, jacobian):
    if jacobian in ("random", "nan"):
        poison(jacobian)
    cell, x, params, h0 = build("logistic", torch.float64)
    length, n = 10, TIME // 10
    ys_now, after = torch.zeros(length, 1, BATCH, n, CHANNELS, dtype=torch.float64), []
    real = shooting.sweep

    def recording(steps, start, ys):
        real(steps, start, ys)
        ys_now[:, :, :, n - ys.shape[3] :] = ys
        after.append(ys_now.clone())

    monkeypatch.setattr(shooting, "sweep", recording)
    ps.scan(
        cell,
        x,
        None,
        h0,
        solver=ps.MultipleShooting(length, tol=0.0, jacobian="zero" if jacobian == "zero" else "exact"),
    )
    want = loop(cell, x, params, h0).unflatten(1, (n, length)).permute(2, 3, 0, 1, 4)  # (m, S, B, n, C)
    assert 1 < len(after) <= n
    for k, ys in enumerate(after, 1):
        assert same_bits(ys[:, :, :, :k], want[:, :, :, :k]), f"after {k} sweeps"
    if jacobian == "zero":
        assert not same_bits(after[0], want), "the bound means something here"


BAD = [float("nan"), float("inf"), -float("inf")]
solvers = pytest.mark.parametrize("solver", [None, ps.Newton(), ps.MultipleShooting(7)], ids=["auto", "newton", "7"])


def assert_as_the_loop(cell, x, params, h0, reset, solver):
    states, h_n = ps.scan(cell, x, tuple(params) or None, h0, reset=reset, solver=solver, return_states=True)
    want = loop(cell, x, params, h0, reset)
    torch.testing.assert_close(states, want, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(h_n, want[:, -1], rtol=1e-5, atol=1e-5, equal_nan=True)
    return states


@solvers
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", CELLS)
def test_a_bad_input_poisons_what_it_poisons_in_the_loop(name, bad, solver):
    """Every input in turn, its own channel (head) and sequence only, from that step until the next reset."""
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, len(cell.inputs) + 1, 45, 8, dtype=torch.float32)
    clean = ps.scan(cell, x, tuple(params) or None, h0, solver=solver, return_states=True)[0]
    for g in range(len(cell.inputs)):
        x[g, 11, g, 2] = bad
    reset = torch.zeros(x.shape[:2], dtype=torch.bool)
    reset[:, 31] = True
    untouched = assert_as_the_loop(cell, x, params, h0, None, solver)
    cleared = assert_as_the_loop(cell, x, params, h0, reset, solver)
    assert bool(torch.isfinite(cleared[:, 31:]).all())
    assert bool(torch.isfinite(untouched[:, :11]).all())
    own = {"channelwise": slice(2, 3), "headwise": slice(0, 4), "dense": slice(0, 8)}[cell.structure]
    outside = torch.ones(8, dtype=torch.bool)
    outside[own] = False
    torch.testing.assert_close(untouched[..., outside], clean[..., outside], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(untouched[-1], clean[-1], rtol=1e-5, atol=1e-5)
    if bad != bad:
        assert bool(untouched[:-1, 11:, cell.output, own].isnan().all(1).any())


@solvers
@pytest.mark.parametrize("bad", BAD)
@pytest.mark.parametrize("name", CELLS)
def test_a_bad_initial_state_goes_as_far_as_in_the_loop(name, bad, solver):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, len(cell.states) + 1, 45, 8, dtype=torch.float32)
    for s in range(len(cell.states)):
        h0[s, s, 5] = bad
    reset = torch.zeros(x.shape[:2], dtype=torch.bool)
    assert_as_the_loop(cell, x, params, h0, None, solver)
    reset[:, 20] = True
    cleared = assert_as_the_loop(cell, x, params, h0, reset, solver)
    assert bool(torch.isfinite(cleared[:, 20:]).all())
    reset[:, 0] = True
    assert bool(torch.isfinite(assert_as_the_loop(cell, x, params, h0, reset, solver)).all())


@pytest.mark.parametrize("value", [3e38, -3e38, 1e30])
@pytest.mark.parametrize("name", CELLS)
def test_inputs_near_the_end_of_the_range_do_not_hang_the_solver(name, value):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, 45, 8, dtype=torch.float32)
    x[0, 9:12], x[1, 30] = value, -value
    for solver in (ps.Newton(max_iters=45), ps.MultipleShooting(8, max_iters=6)):
        assert_as_the_loop(cell, x, params, h0, None, solver)


@ps.cell(structure="headwise", width=4)
def turned(h: ps.State, a: ps.Input, b: ps.Input):
    """Two reflections: neither forgets nor amplifies, so roundings add up."""
    for k in (a, b):
        h = h - 2 * k * (k * h).sum(-1, keepdim=True) / (k * k).sum(-1, keepdim=True)
    return h


@pytest.mark.parametrize("time", [1024, 8192])
@pytest.mark.parametrize("length", [8, 64])
def test_roundings_that_add_up_are_not_worked_off_chunk_by_chunk(time, length):
    """In a few sweeps, as near to the loop in fp64 as twice what the loop in fp32 is."""
    x, _, h0 = random_problem(turned, 2, time, 32, dtype=torch.float32)
    y, _, info = ps.scan(turned, x, h0=h0, solver=ps.MultipleShooting(chunk_length=length), return_info=True)
    exact, plain = loop(turned, x.double(), [], h0.double())[:, :, 0], loop(turned, x, [], h0)[:, :, 0]
    assert info.iterations <= 5
    assert (y - exact).abs().max() <= 2 * (plain - exact).abs().max()


@ps.cell(structure="headwise", width=2)
def doubled(h: ps.State, x: ps.Input):
    return torch.tanh(2 * h) + x


def test_a_rounding_that_grows_is_worked_off():
    """The state 0 repels: a defect of 1e-7 is told from none."""
    x, h0 = torch.zeros(1, 256, 1, 4), torch.zeros(1, 1, 4)
    x[:, 0] = 2**-24
    y, _ = ps.scan(doubled, x, h0=h0, solver=ps.MultipleShooting(chunk_length=8))
    assert relative(y, loop(doubled, x.double(), [], h0.double())[:, :, 0]) <= 1e-5


def flip(h: ps.State, x: ps.Input):
    return torch.tanh(4 * h * x + 0.2)


@pytest.mark.parametrize("structure", ["channelwise", "headwise"])
@pytest.mark.parametrize("with_reset", [False, True])
def test_what_a_few_sweeps_do_not_settle_runs_in_order(structure, with_reset):
    """A sign that inputs keep or flip: sweep after sweep only one more chunk is right. The plan gives up; who asks for chunks gets them."""
    latch = ps.cell(structure=structure, width=4 if structure == "headwise" else None)(flip)
    x = torch.randint(0, 2, (2, 4096, 1, 8)) * 2.0 - 1.0
    h0, reset = torch.ones(2, 1, 8), None
    if with_reset:
        reset = torch.zeros(2, 4096, dtype=torch.bool)
        reset[1, 100] = True
    y, _, info = ps.scan(latch, x, h0=h0, reset=reset, return_info=True)
    want = loop(latch, x.double(), [], h0.double(), reset)[:, :, 0]
    assert relative(y, want) <= 1e-5
    chunks = -(-4096 // info.chunk_length)
    assert info.iterations == 1 + max(8 if structure == "channelwise" else 4, chunks // 32) < chunks
    asked = ps.scan(latch, x, h0=h0, solver=ps.MultipleShooting(chunk_length=info.chunk_length), return_info=True)[2]
    assert asked.iterations == chunks


def test_a_cell_that_does_not_forget_is_given_up_after_two_sweeps():
    """Where matrices cost what the loop does, the forward pass forms none: the second sweep tells that nothing comes nearer."""
    cell = ps.cells.headrotor
    x, params, h0 = random_problem(cell, 4, 512, 128, 0.25, torch.float32)
    dy = torch.randn(4, 512, 128)
    run = lambda x, params, h0: ps.scan(cell, x, params, h0=h0)
    assert "only for gradients" in str(ps.explain(cell, x, params))
    assert ps.scan(cell, x, params, h0=h0, return_info=True)[2].iterations == 3
    wide = x.double(), [p.double() for p in params], h0.double()
    want = by_loop(cell)(*wide)[0]
    assert relative(run(x, params, h0)[0], want) <= 1e-5
    found = gradients(run, x, params, h0, dy, None)
    exact = gradients(by_loop(cell), *wide, dy.double(), None)
    assert max(relative(g, w) for g, w in zip(found, exact, strict=True)) <= 1e-4


def test_few_channels_over_a_long_time_are_worth_matrices():
    cell = ps.cells.headrotor
    x, params, _ = random_problem(cell, 1, 4096, 16, dtype=torch.float32)
    assert "formed only if" in str(ps.explain(cell, x, params))
