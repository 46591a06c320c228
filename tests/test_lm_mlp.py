"""The gradient of the MLP's gate by its kernel, in Triton's interpreter without a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from oracle import relative
from parashoot.errors import GradientError
from parashoot.lm import mlp
from parashoot.lm.mlp import gated, swiglu_backward

pytest.importorskip("triton")
from parashoot.triton import swiglu

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


def problem(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ab (..., 2 C), dy (..., C) and the gradient by ab in float64."""
    ab = (3 * torch.randn(*shape[:-1], 2 * shape[-1], device=DEVICE)).to(dtype)
    dy = torch.randn(*shape, device=DEVICE).to(dtype)
    leaf = ab.double().requires_grad_()
    return ab, dy, torch.autograd.grad(gated(leaf), leaf, dy.double())[0]


@pytest.mark.parametrize("shape", [(2, 3, 40), (5, 16), (1, 1, 33), (0, 8)])
def test_the_kernel_gives_both_halves_of_the_gradient(shape, monkeypatch):
    monkeypatch.setattr(swiglu, "BLOCK", 16)  # several blocks a row, the last one cut off
    ab, dy, want = problem(*shape)
    got = swiglu_backward(ab, dy)
    assert got.shape == ab.shape and got.dtype == ab.dtype
    if got.numel():
        assert relative(got.double(), want) < 1e-6


def test_bf16_is_rounded_once():
    ab, dy, want = problem(4, 64, dtype=torch.bfloat16)
    rounding = 2**-8 if ON_GPU else 2**-7  # Triton's interpreter cuts off what a bf16 does not hold
    assert bool(((swiglu_backward(ab, dy).double() - want).abs() <= rounding * want.abs() + 1e-6).all())


def test_strides_of_both_arguments():
    ab, dy, want = problem(6, 24)
    wide, turned = torch.cat([ab, ab], 1)[:, :48], dy.T.contiguous().T
    assert relative(swiglu_backward(wide, turned).double(), want) < 1e-6


def test_far_out_the_gate_is_open_or_shut():
    ab = torch.tensor([[-1e4, 1e4, -200.0, 200.0, 1.0, 1.0, 1.0, 1.0]], device=DEVICE)
    got = swiglu_backward(ab, torch.ones(1, 4, device=DEVICE))
    assert got.tolist() == [[0.0, 1.0, 0.0, 1.0, 0.0, 1e4, 0.0, 200.0]]


def test_the_operator_is_one():
    ab, dy, _ = problem(3, 8)
    torch.library.opcheck(swiglu_backward, (ab, dy))


@pytest.mark.parametrize("compiled", [False, True])
def test_the_gate_has_the_kernels_gradient(compiled):
    ab, dy, want = problem(3, 8)
    gate = torch.compile(mlp._Gated.apply, backend="aot_eager") if compiled else mlp._Gated.apply
    leaf = ab.clone().requires_grad_()
    y = gate(leaf)
    assert torch.equal(y, gated(ab))
    assert relative(torch.autograd.grad(y, leaf, dy)[0].double(), want) < 1e-6


def test_a_second_derivative_is_refused():
    ab, dy, _ = problem(3, 8)
    leaf = ab.clone().requires_grad_()
    with pytest.raises(GradientError, match="SwiGLU was to be differentiated twice"):
        torch.autograd.grad(mlp._Gated.apply(leaf), leaf, dy, create_graph=True)
