"""On a GPU: the same agreement as on the CPU, storage dtypes, compilation, mixed devices refused."""

from typing import Any

import pytest
import torch

import parashoot as ps
from oracle import CELLS, ONE_OF_EACH, by_loop, gradients, random_problem, random_resets, relative

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")]


def on_gpu(*values: Any) -> Any:
    return [[p.cuda() for p in v] if isinstance(v, list) else v.cuda() for v in values]


@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("solver", [None, ps.Sequential(), ps.MultipleShooting(16)], ids=["auto", "loop", "16"])
@pytest.mark.parametrize("name", CELLS)
def test_agrees_with_the_loop_on_the_cpu(name, solver, reverse):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 2, 300, 8, sigma=0.7)
    reset = random_resets(2, 300, share=0.02)
    run = lambda x, p, h: ps.scan(cell, x, p or None, h, reset=reset.cuda(), reverse=reverse, solver=solver)
    oracle = by_loop(cell, reset, reverse)
    dy, dh = torch.randn(2, 300, 8, dtype=torch.float64), torch.zeros_like(h0)
    y, _ = run(*on_gpu(x, params, h0))
    assert relative(y.cpu(), oracle(x, params, h0)[0]) < 1e-10
    want = gradients(oracle, x, params, h0, dy, None)
    gx, gp, gh = on_gpu(x, params, h0)
    for got, grad in zip(gradients(run, gx, gp, gh, *on_gpu(dy, dh)), want, strict=True):
        assert relative(got.cpu(), grad) < 1e-9


@pytest.mark.parametrize(
    ("dtype", "slope", "floor"),
    [(torch.float32, 0, 1e-5), (torch.bfloat16, 2**-8, 5e-4), (torch.float16, 2**-10, 1e-4)],
    ids=["fp32", "bf16", "fp16"],
)
@pytest.mark.parametrize("name", CELLS)
def test_storage_dtypes_keep_the_numerics_contract(name, dtype, slope, floor):
    cell = CELLS[name]
    x, params, h0 = random_problem(cell, 1, 2048, 8, sigma=0.3)
    x = x.to(dtype).double()
    want = by_loop(cell)(x, params, h0)[0]
    y, _ = ps.scan(cell, *on_gpu(x.to(dtype), [p.float() for p in params], h0.float()))
    assert bool(((y.cpu().double() - want).abs() <= slope * want.abs() + floor).all())


@pytest.mark.parametrize(
    ("name", "gate", "at"), [("gru", "z", -6), ("lstm", "f", 6), ("headgru", "z", -6), ("headrotor", "z", 0)]
)
def test_in_bf16_gates_that_hardly_open_keep_the_contract(name, gate, at):
    cell = getattr(ps.cells, name)
    x, params, h0 = random_problem(cell, 1, 2048, 16, sigma=0.25)
    x[:, :, cell.inputs.index(gate)] += at
    x, h0 = x.to(torch.bfloat16), h0.float()
    params = [p.float() for p in params]
    dy = torch.randn(1, 2048, 16).to(torch.bfloat16)
    run = lambda x, p, h: ps.scan(cell, x, tuple(p), h)
    gx, gp, gh = on_gpu(x, params, h0)
    exact = x.double(), [p.double() for p in params], h0.double()
    y, want = run(gx, gp, gh)[0], by_loop(cell)(*exact)[0]
    assert bool(((y.cpu().double() - want).abs() <= 2**-8 * want.abs() + 5e-4).all())
    got = gradients(run, gx, gp, gh, dy.cuda(), None)
    for mine, true in zip(got, gradients(by_loop(cell), *exact, dy.double(), None), strict=True):
        assert relative(mine.cpu(), true) < 1e-2


@pytest.mark.parametrize("structure", ONE_OF_EACH)
def test_compiles_without_breaks(structure):
    cell = ONE_OF_EACH[structure]
    x, params, h0 = on_gpu(*random_problem(cell, 2, 200, 8, dtype=torch.float32))
    run = lambda x, p, h: ps.scan(cell, x, tuple(p), h)
    compiled = torch.compile(run, fullgraph=True)
    dy, dh = torch.randn(2, 200, 8, device="cuda"), torch.randn_like(h0)
    for got, want in zip(
        gradients(compiled, x, params, h0, dy, dh), gradients(run, x, params, h0, dy, dh), strict=True
    ):
        assert relative(got, want.double()) < 1e-4


def test_layers_train_on_the_gpu():
    layer = ps.ParaGRU(16, 32, 2, num_heads=4, device="cuda")
    with torch.autocast("cuda", torch.bfloat16):
        y, h_n = layer(torch.randn(3, 400, 16, device="cuda"), lengths=torch.tensor([400, 7, 120]))
    y.float().square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert h_n.dtype == torch.float32
    assert all(bool(p.grad.isfinite().all()) for p in layer.parameters() if p.grad is not None)
    assert ps.verify(layer, torch.randn(2, 100, 16, device="cuda")).passed


def test_tensors_on_two_devices_are_refused():
    x, params, h0 = random_problem(ps.cells.gru, 1, 4, 8, dtype=torch.float32)
    with pytest.raises(ps.ArgumentError, match=r"h0: got .*cpu.*expected the device of x, cuda"):
        ps.scan(ps.cells.gru, x.cuda(), [p.cuda() for p in params], h0)
