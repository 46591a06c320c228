"""The causal convolution against its sum written out: shifted products, and kernels, in Triton's interpreter without a GPU."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lm_models import TINY
from oracle import random_resets, relative
from parashoot.errors import GradientError
from parashoot.lm.block import Block
from parashoot.lm.conv import CausalConv, causal_conv, shifted_products

pytest.importorskip("triton")
from parashoot.triton import convolution

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not ON_GPU, reason="no GPU")]


@pytest.fixture
def small(monkeypatch):
    """Tiles that cut short problems into several segments, and channels into several tiles."""
    tiles = {"forward": convolution.Tile(16, 16, 4, 1), "backward": convolution.Tile(16, 8, 8, 1)}
    monkeypatch.setattr(convolution, "tile_for", lambda direction, _: tiles[direction])


def by_loop(u: Tensor, weight: Tensor, bias: Tensor, past: Tensor | None, reset: Tensor | None, heads: int) -> Tensor:
    """y (B, T, H, C / H) of u (B, T, C), one position and one tap after the other."""
    rows = []
    for b, t in ((b, t) for b in range(u.shape[0]) for t in range(u.shape[1])):
        z = bias
        for j, w in enumerate(weight):
            if t >= j:
                z = z + w * u[b, t - j]
            elif past is not None:
                z = z + w * past[b, t - j]
            if reset is not None and t >= j and bool(reset[b, t - j]):
                break
        rows.append(z / (1 + torch.exp(-z)))
    return torch.stack(rows).view(*u.shape[:2], heads, -1)


def problem(
    batch: int, time: int, channels: int, taps: int, past: bool, dtype: torch.dtype = torch.float32
) -> list[Any]:
    """u, a strided half of a wider tensor, weight, bias, past or None, and dy; parameters in float32."""
    wide = torch.randn(batch, time, 2 * channels).to(dtype)
    before = torch.randn(batch, taps - 1, channels).to(dtype) if past else None
    dy = torch.randn(batch, time, channels).to(dtype)
    return [wide[..., :channels], torch.randn(taps, channels), torch.randn(channels), before, dy]


def run(function, u, weight, bias, past, dy, reset, device=DEVICE, dtype=None) -> list[Tensor]:
    """y and the gradients of u, weight, bias and past, if it is there and not empty, on the CPU; dy (B, T, C) or in heads."""
    place = lambda x: x.to(device, dtype).detach()
    given = [None if x is None else place(x).requires_grad_() for x in (u, weight, bias, past)]
    if u.stride(1) == 2 * u.shape[2] and dtype is None:
        wide = torch.empty(*u.shape[:2], 2 * u.shape[2], dtype=u.dtype, device=device)
        given[0] = wide[..., : u.shape[2]].copy_(u).requires_grad_()
    y = function(*given, None if reset is None else reset.to(device), 1 if dy.dim() == 3 else dy.shape[2])
    y = y.flatten(2) if dy.dim() == 3 else y
    leaves = [x for x in given if x is not None and x.numel()]
    return [x.detach().cpu() for x in (y, *torch.autograd.grad(y, leaves, place(dy)))]


def oracle(*given) -> list[Tensor]:
    return run(by_loop, *given, device="cpu", dtype=torch.float64)


def resets(batch: int, time: int) -> Tensor:
    """At random places, the first and the last position among them."""
    reset = random_resets(batch, time, share=0.15)
    reset[0, 0] = reset[0, -1] = reset[-1, time // 2] = True
    return reset


@pytest.mark.parametrize("with_reset", [False, True], ids=["one document", "documents"])
@pytest.mark.parametrize("with_past", [False, True], ids=["begin", "past"])
@pytest.mark.parametrize("taps", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("function", [causal_conv, shifted_products], ids=["kernels", "products"])
def test_agrees_with_the_loop(function, taps, with_past, with_reset, small):
    given = [*problem(2, 37, 19, taps, with_past), resets(2, 37) if with_reset else None]
    for got, want in zip(run(function, *given), oracle(*given), strict=True):
        assert relative(got, want) < 2e-6


@pytest.mark.parametrize("time", [1, 2, 8, 9, 16])
def test_short_sequences_and_full_segments(time, small):
    given = [*problem(3, time, 16, 8, True), resets(3, time)]
    for got, want in zip(run(causal_conv, *given), oracle(*given), strict=True):
        assert relative(got, want) < 2e-6


ROUNDING = {torch.bfloat16: 2**-8 if ON_GPU else 2**-7, torch.float16: 2**-11}  # Triton's interpreter truncates to bf16


@pytest.mark.parametrize(("dtype", "unit"), ROUNDING.items(), ids=["bf16", "fp16"])
def test_short_storage_is_rounded_once(dtype, unit, small):
    """Parameters stay in float32, as under autocast: so do their gradients."""
    given = [*problem(2, 37, 19, 4, True, dtype), resets(2, 37)]
    y, du, dw, db, dpast = run(causal_conv, *given)
    want = oracle(*given)
    assert (y.dtype, du.dtype, dpast.dtype, dw.dtype, db.dtype) == (dtype, dtype, dtype, torch.float32, torch.float32)
    for got, exact in ((y, want[0]), (du, want[1]), (dpast, want[4])):
        assert bool(((got.double() - exact).abs() <= unit * exact.abs() + 4e-6).all())
    assert relative(dw, want[2]) < 2e-6 and relative(db, want[3]) < 2e-6


def test_any_strides(small):
    """Channels apart, one gradient for all elements."""
    u, weight, bias, _, _ = problem(2, 11, 19, 4, False)
    apart, reset = u.transpose(1, 2).contiguous().transpose(1, 2), resets(2, 22)[:, ::2]
    x = apart.to(DEVICE).requires_grad_()
    given = [weight.to(DEVICE), bias.to(DEVICE)]
    causal_conv(x, *given, None, reset.to(DEVICE), 1).sum().backward()
    want = oracle(u, weight, bias, None, torch.ones_like(u), reset)
    assert x.grad is not None and relative(x.grad.cpu(), want[1]) < 2e-6


@pytest.mark.parametrize("function", [causal_conv, shifted_products], ids=["kernels", "products"])
@pytest.mark.parametrize(("channels", "heads"), [(64, 2), (48, 3), (40, 5)])  # heads of whole tiles, and not
def test_gradients_that_lie_head_by_head(function, channels, heads, small):
    u, weight, bias, past, _ = problem(2, 21, channels, 4, True)
    dy = torch.randn(heads, 2, 21, channels // heads).movedim(0, 2)  # as a product of each head leaves it
    reset = resets(2, 21)
    for got, want in zip(
        run(function, u, weight, bias, past, dy, reset), oracle(u, weight, bias, past, dy, reset), strict=True
    ):
        assert relative(got, want) < 2e-6


def test_nothing_crosses_a_reset(small):
    u, weight, bias, _, dy = problem(1, 24, 5, 4, False)
    reset = torch.zeros(1, 24, dtype=torch.bool)
    reset[0, 16] = True
    spoiled = torch.cat([u[:, :15], torch.full_like(u[:, :1], math.nan), u[:, 16:]], 1)
    y, du, *_ = run(causal_conv, spoiled, weight, bias, None, dy, reset)
    alone = oracle(u[:, 16:], weight, bias, None, dy[:, 16:], None)
    assert relative(y[:, 16:], alone[0]) < 2e-6 and relative(du[:, 16:], alone[1]) < 2e-6
    late = torch.cat([torch.zeros_like(dy[:, :16]), dy[:, 16:]], 1)
    assert not run(causal_conv, u, weight, bias, None, late, reset)[1][:, :16].any()


def test_large_inputs_do_not_overflow(small):
    """Where e^-z leaves float32, silu(z) is 0 or z and its slope 0 or 1."""
    u = torch.tensor([-1e4, -200.0, -90.0, 90.0, 200.0, 1e4])[None, :, None].expand(1, 6, 3)
    y, du, *_ = run(causal_conv, u, torch.ones(1, 3), torch.zeros(3), None, torch.ones(1, 6, 3), None)
    torch.testing.assert_close(y, u.clamp(min=0.0), rtol=1e-6, atol=1e-30)
    torch.testing.assert_close(du, (u > 0).float(), rtol=1e-6, atol=1e-30)


def test_it_is_a_sound_operator(small):
    u, weight, bias, past, _ = problem(2, 9, 5, 3, True)
    given = [x.to(DEVICE).requires_grad_() for x in (u, weight, bias, past)]
    torch.library.opcheck(causal_conv, (*given, resets(2, 9).to(DEVICE), 1))
    torch.library.opcheck(causal_conv, (*given[:3], None, None, 5))


def test_a_second_derivative_is_refused(small):
    u, weight, bias, _, _ = problem(1, 9, 5, 3, False)
    x = u.to(DEVICE).requires_grad_()
    y = causal_conv(x, weight.to(DEVICE), bias.to(DEVICE), None, None, 1)
    with pytest.raises(GradientError, match="CausalConv was to be differentiated twice"):
        torch.autograd.grad(y.square().sum(), x, create_graph=True)


def test_the_module_is_a_convolution_and_isolates_nan():
    conv = CausalConv(3, 4)
    reference = torch.nn.Conv1d(3, 3, 4, groups=3, padding=3)
    reference.load_state_dict({"weight": conv.weight.flip(0).T[:, None], "bias": conv.bias})
    u = torch.randn(2, 9, 3)
    expected = torch.nn.functional.silu(reference(u.mT)[..., :9].mT)
    torch.testing.assert_close(conv(u)[0], expected)
    u[:, 4] = math.nan
    reset = torch.zeros(2, 9, dtype=torch.bool)
    reset[:, 5] = True
    y, past = conv(u, None, reset)
    assert bool(torch.isfinite(y[:, 5:]).all())
    assert bool(torch.isfinite(past).all())


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=on_a_gpu)])
@pytest.mark.parametrize("taps", [1, 4, 8, 9])
def test_pieces_of_the_module_equal_the_whole(taps, device):
    """Pieces shorter than the reach among them, with a document that begins inside."""
    conv = CausalConv(5, taps).to(device)
    u, reset = torch.randn(2, 30, 5, device=device), resets(2, 30).to(device)
    whole, last = conv(u, None, reset)
    rows, past = [], None
    for a, b in ((0, 2), (2, 3), (3, 20), (20, 30)):
        y, past = conv(u[:, a:b], past, reset[:, a:b])
        rows.append(y)
    torch.testing.assert_close(torch.cat(rows, 1), whole, rtol=1e-5, atol=1e-5)
    assert past is not None and past.untyped_storage().nbytes() == past.numel() * past.element_size()
    torch.testing.assert_close(past, last, rtol=0, atol=0)


# Registers a thread: a multiprocessor has 65,536. A thread takes two channels, backward with up to 4 taps four: 32 for each channel.
BUDGETS = {
    ("forward", 4, "bf16", False, False): 48, ("forward", 4, "fp32", False, False): 56, ("forward", 4, "bf16", True, True): 64,
    ("forward", 8, "fp32", True, True): 96, ("forward", 1, "fp16", True, False): 48,
    ("backward", 4, "bf16", False, False): 128, ("backward", 4, "fp32", False, False): 128, ("backward", 4, "bf16", False, True): 128,
    ("backward", 8, "fp32", True, True): 192, ("backward", 1, "fp16", True, False): 96,
}  # fmt: skip


def test_kernels_compile_for_hopper_within_their_budgets():
    here = Path(__file__).parent
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = str(here.parent / "src")
    jobs = json.dumps([("convolution", *key) for key in BUDGETS])
    command = [sys.executable, str(here / "ahead_of_time.py"), jobs]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = {tuple(row["job"]): row for row in map(json.loads, done.stdout.splitlines())}
    assert rows.keys() == BUDGETS.keys()
    over = [row for key, row in rows.items() if row["registers"] > BUDGETS[key] or row["spilled"] or row["shared"]]
    assert over == []


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_block_under_autocast_agrees_with_the_cpu(compiled):
    block = Block(TINY.replace(hidden_size=64))
    x, reset = torch.randn(3, 130, 64), resets(3, 130)
    y, _ = block(x, None, reset)
    y.square().mean().backward()
    want = [y.detach(), *(p.grad for p in block.mixer.conv.parameters())]
    block.zero_grad()
    block.cuda()
    with torch.autocast("cuda", torch.bfloat16):
        y, _ = (torch.compile(block, fullgraph=True) if compiled else block)(x.cuda(), None, reset.cuda())
        loss = y.float().square().mean()
    loss.backward()
    got = [y.detach().cpu(), *(p.grad.cpu() for p in block.mixer.conv.parameters())]
    assert got[1].dtype == torch.float32
    for mine, its in zip(got, want, strict=True):
        assert relative(mine, its) < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_the_forward_pass_can_be_captured():
    conv = CausalConv(70, 4).cuda()
    u = torch.randn(2, 100, 70, device="cuda")
    with torch.no_grad():
        conv(u)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y, past = conv(u)
        u.copy_(torch.randn_like(u))
        graph.replay()
        want, after = conv(u)
    assert torch.equal(y, want) and torch.equal(past, after)


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
def test_the_module_runs_the_kernels_and_no_length_compiles_new_ones():
    conv, kinds = CausalConv(64, 4, heads=2).cuda(), []
    for batch, time in ((2, 32), (1, 33), (3, 128), (5, 1000)):
        u = torch.randn(batch, time, 64, device="cuda", requires_grad=True)
        y, _ = conv(u)
        y.sum().backward()
        assert y.grad_fn is not None and "causal_conv" in type(y.grad_fn).__name__.lower()
        kernels = convolution.forward, convolution.backward
        kinds.append([len(kernel.device_caches[u.device.index][0]) for kernel in kernels])
    assert kinds[0] == kinds[-1]
