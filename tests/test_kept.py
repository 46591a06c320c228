"""What kernels keep for the backward pass beside y, in Triton's interpreter without a GPU."""

import linecache
from typing import Any

import pytest
import torch

import parashoot as ps
from oracle import by_loop, gradients, random_problem, relative
from parashoot.tiling import Tiling
from parashoot.trace import trace_of

pytest.importorskip("triton")
ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
KERNEL = ps.MultipleShooting(backend="triton")
# One chunk; several, led in from far enough; several and corrected.
ALONE, LED, CORRECTED = Tiling(64, 1, 2, 2, 1), Tiling(64, 1, 4, 3, 3, 12, 2, 32), Tiling(64, 1, 2, 2, 5, 2, 4, 64)
BF16 = 2**-8 if ON_GPU else 2**-7  # the interpreter cuts fp32 off where hardware rounds it to bf16


@ps.cell
def highest(h: ps.State, x: ps.Input):
    return 0.9 * torch.maximum(h, torch.tanh(x))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float16, 2**-10), (torch.bfloat16, BF16)], ids=["fp16", "bf16"])
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("chosen", [ALONE, LED, CORRECTED], ids=["alone", "led", "corrected"])
def test_the_rounding_of_y_crosses_no_kink(dtype, rounding, reverse, chosen, tiling):
    tiling(chosen)
    x, h0 = torch.randn(1, 62, 1, 60).to(dtype), torch.randn(1, 1, 60)
    x[:, 1::2] = x[:, ::2]  # what comes again is a little above 0.9 of itself ...
    x[:, 3::4] *= 0.9  # ... or about as high as the state is
    oracle = by_loop(highest, reverse=reverse)
    gx, gh = x.to(DEVICE), h0.to(DEVICE)
    dy = torch.randn(1, 62, 60).to(dtype)
    run = lambda x, p, h: ps.scan(highest, x, None, h, reverse=reverse, solver=KERNEL)
    got, dh = gradients(run, gx, [], gh, dy.to(DEVICE), None)
    want, wanted_dh = gradients(oracle, x.double(), [], h0.double(), dy.double(), None)
    assert bool(((got.cpu().double() - want).abs() <= 2 * rounding * want.abs() + 1e-5).all())
    assert relative(dh.cpu(), wanted_dh) < 1e-5


def test_what_is_kept_for_backward_is_known_to_the_compiler(tiling):
    tiling(LED)
    x = torch.randn(2, 50, 1, 8, device=DEVICE).to(torch.bfloat16)
    run = lambda x: ps.scan(highest, x, None, solver=KERNEL)[0].float().square().sum()
    x.requires_grad_()
    (want,) = torch.autograd.grad(run(x), x)
    (got,) = torch.autograd.grad(torch.compile(run, backend="aot_eager", fullgraph=True)(x), x)
    assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("expression", "kinked"),
    [
        ("torch.tanh(h + x)", False),
        ("torch.maximum(h, x)", True),
        ("torch.relu(x) + 0.5 * h", False),
        ("torch.abs(0.5 * h) + x", True),
    ],
)
def test_states_are_kept_where_a_step_compares_its_own(expression, kinked):
    name = f"<kept {expression}>"
    text = f"def step(h: ps.State, x: ps.Input):\n    return {expression}\n"
    linecache.cache[name] = (len(text), None, text.splitlines(True), name)
    space: dict[str, Any] = {"ps": ps, "torch": torch}
    exec(compile(text, name, "exec"), space)
    found = trace_of(ps.cell(space["step"]), torch.float32, torch.device("cpu"))
    kept = [found.keeps_states(1, dtype) for dtype in (torch.float32, torch.bfloat16, torch.float16)]
    assert kept == [False, kinked, kinked] and found.keeps_states(2, torch.float32)


@pytest.mark.parametrize(("cell", "kept"), [(ps.cells.headrotor, True), (ps.cells.headgru, False)], ids=str)
def test_states_are_kept_where_a_step_sums_over_a_head(cell, kept):
    found = trace_of(cell, torch.float32, torch.device("cpu"))
    assert [found.keeps_states(1, dtype) for dtype in (torch.float32, torch.bfloat16)] == [False, kept]


# On a GPU in bf16 its own tanh, 1e-4 off, adds up as well (test_cuda.py bounds that).
@pytest.mark.parametrize("dtype", [torch.float16] if ON_GPU else [torch.float16, torch.bfloat16], ids=str)
def test_the_rounding_of_y_does_not_add_up_in_what_turns_without_end(dtype):
    cell = ps.cells.headrotor
    x, params, h0 = random_problem(cell, 2, 100, 16, sigma=0.25)
    x[:, :, 4] -= 5.0  # the gate stays shut
    x, h0 = x.to(dtype), h0.float()
    params = [p.float() for p in params]
    dy = torch.randn(2, 100, 16).to(dtype)
    run = lambda x, p, h: ps.scan(cell, x, tuple(p), h, solver=KERNEL)
    given = x.to(DEVICE), [p.to(DEVICE) for p in params], h0.to(DEVICE)
    got = gradients(run, *given, dy.to(DEVICE), None)
    want = gradients(by_loop(cell), x.double(), [p.double() for p in params], h0.double(), dy.double(), None)
    for mine, exact in zip(got[1:], want[1:], strict=True):  # by the parameters and h0, which are float32
        assert relative(mine.cpu(), exact) < 1e-3
