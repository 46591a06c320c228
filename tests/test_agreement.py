"""The numerics contract: every shipped cell against the fp64 loop at T = 2048, in every storage dtype, forward and backward."""

import functools

import pytest
import torch

import parashoot as ps
from oracle import CELLS, by_loop, gradients, loop, random_problem, relative

TIME, CHANNELS = 2048, 8
SIGMAS = (0.3, 1.0, 2.0)
SOLVERS = {"auto": None, "32": ps.MultipleShooting(32), "100": ps.MultipleShooting(100)}  # the last leaves a part chunk
# The topmost mark varies fastest, so solvers share the loop's cached results.
problems = pytest.mark.parametrize("sigma", SIGMAS)
solvers = pytest.mark.parametrize("solver", SOLVERS.values(), ids=SOLVERS)
two_solvers = pytest.mark.parametrize("solver", [None, ps.MultipleShooting(32)], ids=["auto", "32"])
every_cell = pytest.mark.parametrize("name", CELLS)


@functools.lru_cache(maxsize=4)
def problem(name, sigma, dtype):
    """The problem rounded to `dtype`, and the fp64 loop's states on those very numbers."""
    x, params, h0 = random_problem(CELLS[name], 1, TIME, CHANNELS, sigma, dtype)
    return x, params, h0, loop(CELLS[name], x.double(), [p.double() for p in params], h0.double())


@functools.lru_cache(maxsize=4)
def fp32_loop_error(name, sigma):
    x, params, h0, want = problem(name, sigma, torch.float32)
    return (loop(CELLS[name], x, params, h0).double() - want).abs().amax((0, 1, 3))


def cotangents():
    generator = torch.Generator().manual_seed(1)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


@functools.lru_cache(maxsize=2)
def loop_gradients(name, sigma, dtype):
    """Gradients by x, params and h0 through the loop in `dtype`, at the fp32 problem."""
    cell, draw = CELLS[name], cotangents()
    x, params, h0, _ = problem(name, sigma, torch.float32)
    dy, dh = draw(1, TIME, CHANNELS), draw(*h0.shape)
    to = lambda v: v.float().to(dtype)
    return gradients(by_loop(cell), to(x), [to(p) for p in params], to(h0), to(dy), to(dh))


@solvers
@problems
@every_cell
def test_fp32_states_are_within_1e5_or_twice_the_fp32_loops_error(name, sigma, solver):
    cell = CELLS[name]
    x, params, h0, want = problem(name, sigma, torch.float32)
    states, h_n = ps.scan(cell, x, tuple(params), h0, solver=solver, return_states=True)
    error = (states.double() - want).abs().amax((0, 1, 3))
    assert states.dtype == h_n.dtype == torch.float32
    if not bool((error <= 1e-5).all()):  # the fp32 loop is run only where its own error matters
        allowed = (2 * fp32_loop_error(name, sigma)).clamp_min(1e-5)
        assert bool((error <= allowed).all()), f"{error.tolist()} by slot, {allowed.tolist()} allowed"
    assert torch.equal(h_n, states[:, -1])


@solvers
@problems
@every_cell
def test_fp64_states_are_within_1e10(name, sigma, solver):
    cell = CELLS[name]
    x, params, h0, want = problem(name, sigma, torch.float64)
    y, h_n = ps.scan(cell, x, tuple(params), h0, solver=solver)
    assert y.dtype == h_n.dtype == torch.float64
    assert float((y - want[:, :, cell.output]).abs().max()) <= 1e-10
    assert float((h_n - want[:, -1]).abs().max()) <= 1e-10


@two_solvers
@problems
@every_cell
def test_fp32_gradients_are_within_1e4_or_twice_the_fp32_loops_error(name, sigma, solver):
    cell, draw = CELLS[name], cotangents()
    x, params, h0, _ = problem(name, sigma, torch.float32)
    dy, dh = draw(1, TIME, CHANNELS).float(), draw(*h0.shape).float()
    got = gradients(lambda x, p, h: ps.scan(cell, x, tuple(p), h, solver=solver), x, params, h0, dy, dh)
    want = loop_gradients(name, sigma, torch.float64)
    errors = [relative(g, w) for g, w in zip(got, want, strict=True)]
    if not max(errors) <= 1e-4:
        plain = loop_gradients(name, sigma, torch.float32)
        allowed = [max(1e-4, 2 * relative(g, w)) for g, w in zip(plain, want, strict=True)]
        named = dict(zip(["x", *cell.params, "h0"], zip(errors, allowed, strict=True), strict=True))
        assert all(error <= limit for error, limit in named.values()), f"(error, allowed): {named}"


@two_solvers
@problems
@every_cell
@pytest.mark.parametrize(
    ("dtype", "slope", "floor"), [(torch.bfloat16, 2**-8, 5e-4), (torch.float16, 2**-10, 1e-4)], ids=["bf16", "fp16"]
)
def test_half_precision_storage_only_rounds_the_result(name, sigma, dtype, slope, floor, solver):
    cell = CELLS[name]
    x, params, h0, want = problem(name, sigma, dtype)
    y, h_n = ps.scan(cell, x, tuple(params), h0, solver=solver)
    assert y.dtype == h_n.dtype == dtype
    for got, wanted in ((y, want[:, :, cell.output]), (h_n, want[:, -1])):
        excess = (got.double() - wanted).abs() - (slope * wanted.abs() + floor)
        assert float(excess.max()) <= 0


@every_cell
def test_half_precision_gradients_follow_the_fp64_loop(name):
    """Stored as bf16, summed in fp32: only the rounding of the result and of the cotangents' states remains."""
    cell, draw = CELLS[name], cotangents()
    x, params, h0, _ = problem(name, 1.0, torch.bfloat16)
    dy, dh = draw(1, TIME, CHANNELS).bfloat16(), draw(*h0.shape).bfloat16()
    exact = [p.double() for p in params]
    want = gradients(by_loop(cell), x.double(), exact, h0.double(), dy.double(), dh.double())
    got = gradients(lambda x, p, h: ps.scan(cell, x, tuple(p), h), x, params, h0, dy, dh)
    for what, g, w in zip(["x", *cell.params, "h0"], got, want, strict=True):
        assert g.dtype == torch.bfloat16
        assert relative(g, w) <= 2**-8, f"gradient by {what}: {relative(g, w):.2g}"


@pytest.mark.parametrize("sigma", [0.3, 1.0])
@pytest.mark.parametrize("name", ["elman", "headgru"])
def test_wide_matrices_without_a_jacobian_keep_the_contract(name, sigma):
    """What is chosen for heads and layers too wide for exact products: fixed-point iterations on long chunks."""
    cell = CELLS["elman"] if name == "elman" else CELLS["headgru"].with_width(32)
    x, params, h0 = random_problem(cell, 1, TIME, 32, sigma, torch.float32)
    exact = x.double(), [p.double() for p in params], h0.double()
    want = loop(cell, *exact)[:, :, 0]
    solver = ps.MultipleShooting(128, jacobian="auto")
    y, _, info = ps.scan(cell, x, tuple(params), h0, solver=solver, return_info=True)
    assert info.iterations > 1
    assert float((y - want).abs().max()) <= 1e-5
    dy = cotangents()(1, TIME, 32).float()
    run = lambda x, p, h: ps.scan(cell, x, tuple(p), h, solver=solver)
    by_the_loop = gradients(by_loop(cell), *exact, dy.double(), None)
    for g, w in zip(gradients(run, x, params, h0, dy, None), by_the_loop, strict=True):
        assert relative(g, w) <= 1e-4
