"""The convolution before a recurrence and the gated norm after it, which share the gradient of their input, against float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from lm_models import TINY
from oracle import random_resets, relative
from parashoot.errors import GradientError
from parashoot.lm.block import Block, Recurrence
from parashoot.lm.conv import CausalConv, causal_conv_backward, shifted_products
from parashoot.lm.gate import GatedNorm, HalfConv, gated_norm, gated_norm_backward, gated_norm_forward

pytest.importorskip("triton")

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
EPS = 1e-5


def problem(*shape: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dn and y (..., C), ug (..., 2 C), weight (C,) in float32."""
    dn, y, ug = torch.randn(shape), torch.randn(shape), 2 * torch.randn(*shape[:-1], 2 * shape[-1])
    return dn.to(DEVICE, dtype), y.to(DEVICE, dtype), ug.to(DEVICE, dtype), torch.randn(shape[-1], device=DEVICE)


def exact(dn: Tensor, y: Tensor, ug: Tensor, weight: Tensor) -> list[Tensor]:
    """n, dy, dg and dw in float64."""
    y, ug, weight = (x.double().requires_grad_() for x in (y, ug, weight))
    n = gated_norm(y, ug, weight, EPS)
    dy, dug, dw = torch.autograd.grad(n, (y, ug, weight), dn.double())
    assert not dug[..., : y.shape[-1]].any()
    return [n.detach(), dy, dug[..., y.shape[-1] :], dw]


def by_kernel(dn: Tensor, y: Tensor, ug: Tensor, weight: Tensor) -> list[Tensor]:
    n, (dy, dug, dw) = gated_norm_forward(y, ug, weight, EPS), gated_norm_backward(dn, y, ug, weight, EPS)
    assert dug.is_contiguous() and dug.shape == ug.shape
    return [n, dy, dug[..., y.shape[-1] :], dw]


@pytest.mark.parametrize("shape", [(2, 3, 40), (37, 16), (1, 1, 33), (3, 2), (0, 8)])
def test_the_kernels_give_the_norm_and_its_gradient(shape):
    given = problem(*shape)
    for got, want in zip(by_kernel(*given), exact(*given), strict=True):
        assert got.shape == want.shape
        assert not got.numel() or relative(got.double(), want) < 2e-6


def test_bf16_is_rounded_once_and_the_weights_gradient_not_at_all():
    given = problem(9, 64, dtype=torch.bfloat16)
    *rounded, dw = by_kernel(*given)
    rounding = 2**-8 if ON_GPU else 2**-7  # Triton's interpreter cuts off what a bf16 does not hold
    want = exact(*given)
    for got, true in zip(rounded, want[:3], strict=True):
        assert got.dtype == torch.bfloat16
        assert bool(((got.double() - true).abs() <= rounding * true.abs() + 1e-5).all())
    assert dw.dtype == torch.float32 and relative(dw.double(), want[3]) < 1e-5


def test_any_strides():
    dn, y, ug, weight = problem(6, 24)
    wide = torch.cat([ug, ug], 1)[:, :48]
    dn_turned, y_turned = (x.T.contiguous().T for x in (dn, y))
    for got, want in zip(by_kernel(dn_turned, y_turned, wide, weight), exact(dn, y, ug, weight), strict=True):
        assert relative(got.double(), want) < 2e-6


def test_a_row_of_zeros_has_a_gradient():
    dn, y, ug, weight = problem(2, 8)
    y[0] = 0.0
    for got, want in zip(by_kernel(dn, y, ug, weight), exact(dn, y, ug, weight), strict=True):
        assert relative(got.double(), want) < 2e-6


def test_the_operators_are_sound():
    given = problem(3, 8)
    torch.library.opcheck(gated_norm_forward, (*given[1:], EPS))
    torch.library.opcheck(gated_norm_backward, (*given, EPS), test_utils=("test_schema", "test_autograd_registration"))
    conv, u = CausalConv(5, 3).to(DEVICE), torch.randn(2, 9, 5, device=DEVICE)
    given = (u.view(2, 9, 1, 5), u, conv.weight.detach(), conv.bias.detach(), None, None, torch.empty_like(u))
    torch.library.opcheck(causal_conv_backward, given)


class Pair(torch.nn.Module):
    """A convolution, something between, a gated norm, by kernels or by PyTorch."""

    def __init__(self, channels: int, heads: int):
        super().__init__()
        self.conv, self.norm = HalfConv(channels, 4, heads), GatedNorm(channels, eps=EPS)

    def forward(self, ug: Tensor, past: Tensor | None, reset: Tensor | None) -> tuple[Tensor, Tensor]:
        v, ug, after = self.conv(ug, past, reset)
        return self.norm(v.flatten(2) if v.dim() == 4 else v, ug, self.conv.fused(ug)), after


@pytest.fixture
def kernels(monkeypatch):
    """They run on the CPU too, in float32."""
    monkeypatch.setattr(CausalConv, "fused", lambda self, u: u.dtype == torch.float32)


def gradients(
    pair: Pair,
    ug: Tensor,
    past: Tensor,
    reset: Tensor | None,
    run: Callable[..., tuple[Tensor, Tensor]] | None = None,
) -> list[Tensor]:
    leaves = [ug.clone().requires_grad_(), past.clone().requires_grad_()]
    n, after = (pair if run is None else run)(*leaves, reset)
    loss = (n.sin() + 0.1 * n).sum() + after.square().sum()
    return [n.detach(), *torch.autograd.grad(loss, [*leaves, *pair.parameters()])]


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("heads", [1, 2])
def test_both_halves_of_the_gradient_arrive(heads, compiled, kernels):
    """The past that is handed on has a gradient too, which meets the shared one."""
    pair = Pair(32, heads).to(DEVICE)
    torch.nn.init.normal_(pair.norm.weight)
    ug, past = torch.randn(2, 21, 64, device=DEVICE), torch.randn(2, 3, 32, device=DEVICE)
    reset = random_resets(2, 21, share=0.15).to(DEVICE)
    function = torch.compile(pair, backend="aot_eager", fullgraph=True) if compiled else pair
    got = gradients(pair, ug, past, reset, function)
    want = gradients(pair.double(), ug.double(), past.double(), reset)
    for mine, its in zip(got, want, strict=True):
        assert relative(mine.double(), its) < 1e-5


def test_a_gate_that_nothing_is_asked_of(kernels):
    """The convolution alone has its gradient, and g none."""
    pair, ug = Pair(16, 1).to(DEVICE), torch.randn(1, 9, 32, device=DEVICE, requires_grad=True)
    v, _, _ = pair.conv(ug)
    (got,) = torch.autograd.grad(v.square().sum(), ug)
    leaf = ug.detach().double().requires_grad_()
    weight, bias = pair.conv.weight.detach().double(), pair.conv.bias.detach().double()
    (want,) = torch.autograd.grad(shifted_products(leaf[..., :16], weight, bias, None, None, 1).square().sum(), leaf)
    assert relative(got.double(), want) < 2e-6


def test_the_anomaly_detector_finds_nothing(kernels):
    pair, ug = Pair(16, 1).to(DEVICE), torch.randn(1, 9, 32, device=DEVICE)
    with torch.autograd.detect_anomaly(check_nan=True):
        assert all(bool(x.isfinite().all()) for x in gradients(pair, ug, ug[:, :3, :16], None))


def test_hooks_of_the_modules_run(kernels):
    mixer, seen = Recurrence(TINY).to(DEVICE), []
    for module in (mixer.conv, mixer.norm):
        module.register_forward_hook(lambda module, given, out: seen.append(type(module).__name__))
    mixer(torch.randn(1, 9, TINY.hidden_size, device=DEVICE), None, None)
    assert seen == ["HalfConv", "GatedNorm"]


def test_a_second_derivative_is_refused(kernels):
    pair, ug = Pair(16, 1).to(DEVICE), torch.randn(1, 9, 32, device=DEVICE, requires_grad=True)
    with pytest.raises(GradientError, match="GatedNorm was to be differentiated twice"):
        torch.autograd.grad(pair(ug, None, None)[0].sin().sum(), ug, create_graph=True)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_every_gradient_of_a_block_agrees_with_the_cpu(compiled):
    block = Block(TINY.replace(hidden_size=64))
    x = torch.randn(3, 130, 64)
    (block(x)[0].square() * x).mean().backward()
    want = {name: p.grad for name, p in block.named_parameters()}
    block.zero_grad()
    block.cuda()
    (y, _), x = (torch.compile(block, fullgraph=True) if compiled else block)(x.cuda()), x.cuda()
    (y.square() * x).mean().backward()
    for name, p in block.named_parameters():
        its = want[name]
        assert p.grad is not None and its is not None
        assert relative(p.grad.cpu(), its) < 1e-3, name
