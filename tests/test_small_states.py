"""Chunks that agree because all of it is small: what a cell makes of that later counts, against the fp64 loop."""

from typing import Any

import pytest
import torch

import parashoot as ps
from oracle import by_loop, loop

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # for kernels
pytestmark = [pytest.mark.gpu] if DEVICE == "cuda" else []


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


# Steps whose derivative is zero where chunks begin


@ps.cell
def logistic(h: ps.State, x: ps.Input):
    return torch.relu(h + x * h * (1 - h))


@ps.cell
def rectified(h: ps.State, x: ps.Input):
    return torch.relu(1.05 * h + x)


@ps.cell
def folded(h: ps.State, x: ps.Input):
    return torch.tanh(1.06 * h.abs() + x)


@ps.cell
def chosen(h: ps.State, x: ps.Input):
    return torch.where(h > 0, torch.tanh(1.06 * h), 0.0) + x


@ps.cell
def floored(h: ps.State, k: ps.State, x: ps.Input):
    return torch.maximum(1.05 * h, 0.0 * h) + x, 0.5 * k + h


KINKED = [logistic, rectified, folded, chosen, floored]
ways = {
    "default": None,
    "shooting": ps.MultipleShooting(64),
    "newton": ps.Newton(),
    "diagonal": ps.MultipleShooting(64, jacobian="diagonal"),
    "kernels": ps.MultipleShooting(64, backend="triton"),
}


@pytest.mark.parametrize(
    ("cell", "way"),
    [(c, way) for c in KINKED for way in ways if way != "kernels" or c in (logistic, floored)],  # which take seconds
    ids=lambda v: getattr(v, "name", v),
)
def test_a_derivative_of_zero_at_zero_proves_nothing(cell, way):
    if way == "kernels":
        pytest.importorskip("triton")
    x, h0 = torch.zeros(1, 512, 1, 2), torch.zeros(1, len(cell.states), 2)
    h0[:, 0] = 1e-8
    if cell is logistic:
        x += 0.06
    want = loop(cell, x.double(), [], h0.double())[:, :, cell.output]
    assert float(want[0, -1, 0]) > 0.1
    place = DEVICE if way == "kernels" else "cpu"
    y = ps.scan(cell, x.to(place), None, h0.to(place), solver=ways[way])[0]
    torch.testing.assert_close(y.double().cpu(), want, rtol=1e-3, atol=1e-5)


def test_a_limit_says_so_where_a_kink_hides_a_state():
    h0 = torch.full((1, 1, 2), 1e-8)
    with pytest.raises(ps.ConvergenceError):
        ps.scan(rectified, torch.zeros(1, 1024, 1, 2), None, h0, solver=ps.MultipleShooting(64, max_iters=1))


def test_units_that_switch_off_take_no_more_passes():
    x = torch.randn(2, 512, 1, 8)
    for solver, most in ((ps.MultipleShooting(64), 3), (ps.MultipleShooting(128, backend="triton"), 1)):
        if solver.backend == "triton":
            pytest.importorskip("triton")
        place = DEVICE if solver.backend == "triton" else "cpu"
        info = ps.scan(half, x.to(place), None, solver=solver, return_info=True)[2]
        assert info.iterations <= most


@ps.cell
def half(h: ps.State, x: ps.Input):
    return torch.relu(0.5 * h + x)


# Channels and heads beside others


def beside(cell: ps.Cell) -> torch.Tensor:
    """Half of the channels forget, the others make small states grow."""
    if cell is dense:
        return torch.diag(torch.tensor([0.5] * 4 + [1.05] * 4))
    return torch.eye(4) * torch.tensor([0.5, 1.05])[:, None, None]


@pytest.mark.parametrize("solver", SOLVERS, ids=["default", "shooting", "zero", "diagonal"])
@pytest.mark.parametrize("cell", [dense, heads], ids=lambda c: c.name)
def test_busy_channels_hide_no_quiet_ones(cell, solver):
    torch.manual_seed(0)
    W, x, h0 = beside(cell), torch.randn(1, 2048, 1, 8), torch.full((1, 1, 8), 1e-10)
    x[..., 4:] = 0.0
    found = []
    for run in (
        lambda *given: ps.scan(cell, *given, solver=solver),
        lambda x, p, h: by_loop(cell)(x.double(), [v.double() for v in p], h.double()),
    ):
        start = h0.clone().requires_grad_()
        y = run(x, [W], start)[0]
        (grad,) = torch.autograd.grad(y[:, :256].sum(), start)
        found.append((y.detach().double(), grad))
    (y, grad), (want, exact) = found
    assert float(want[0, -1].flatten()[-1]) > 0.3
    torch.testing.assert_close(y, want.view(y.shape), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(grad, exact, rtol=1e-3, atol=0.0)


def test_a_busy_head_hides_no_quiet_one_in_kernels():
    pytest.importorskip("triton")
    torch.manual_seed(0)
    x, h0 = torch.randn(1, 640, 1, 8), torch.full((1, 1, 8), 1e-10)
    x[..., 4:] = 0.0
    want = loop(heads, x.double(), [beside(heads).double()], h0.double())[:, :, 0]
    given = x.to(DEVICE), [beside(heads).to(DEVICE)], h0.to(DEVICE)
    y = ps.scan(heads, *given, solver=ps.MultipleShooting(64, backend="triton"))[0]
    torch.testing.assert_close(y.double().cpu(), want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("where", ["at the first step", "beside a busy sequence"])
@pytest.mark.parametrize("solver", [None, ps.MultipleShooting(64)], ids=["default", "64"])
def test_a_quiet_sequence_over_chunks_grows(where, solver):
    torch.manual_seed(0)
    module = torch.nn.RNN(8, 8, bias=False, batch_first=True)
    x, h0 = torch.zeros(2, 4096, 8), torch.zeros(1, 2, 8)
    if where == "at the first step":  # which no guess reads
        x[:, 0] = 1e-9
    else:
        x[0], h0[:, 1] = torch.randn(4096, 8), 1e-9
    with torch.no_grad():
        weight: Any = module.weight_hh_l0
        weight.copy_(1.05 * torch.eye(8))
        want = module(x, h0)[0]
        assert float(want[1, -1, 0].abs()) > 0.3 or where == "at the first step"
        torch.testing.assert_close(ps.parallelize(module, solver)(x, h0)[0], want, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_hypot_of_what_has_no_square(dtype):
    @ps.cell
    def far(h: ps.State, x: ps.Input, u: ps.Input):
        return torch.hypot(x, u) * torch.hypot(0.0 * h, torch.ones_like(h))

    x = torch.tensor([1e-30, 1e20, 3.0, 0.0, torch.inf, 1e-30, -1e20]).to(dtype)
    u = torch.tensor([2e-30, -1e19, 4.0, 0.0, 1.0, 0.0, 1e20]).to(dtype)
    y, _ = ps.scan(far, torch.stack([x, u])[None, None].to(DEVICE), solver=ps.MultipleShooting(backend="triton"))
    rtol = 1e-6 if dtype == torch.float32 else 2**-7  # Triton's interpreter cuts off what a bf16 does not hold
    torch.testing.assert_close(y[0, 0].cpu(), torch.hypot(x.double(), u.double()).to(dtype), rtol=rtol, atol=0.0)
