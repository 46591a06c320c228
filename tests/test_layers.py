"""Layers where their arguments meet: lengths with steps that zeros do not suit, narrow dtypes, masks and states of the wrong kind."""

from typing import Any

import pytest
import torch

import parashoot as ps
from parashoot.errors import ArgumentError, ArgumentTypeError


@ps.cell
def rooted(h: ps.State, x: ps.Input):
    return torch.tanh(0.5 * h + torch.sqrt(x.abs()))


@ps.cell
def divided(h: ps.State, u: ps.Input, x: ps.Input):
    return torch.tanh(0.5 * h + u / x + torch.log(x.abs()))


@ps.cell
def exploding(h: ps.State, x: ps.Input, w: ps.Param):
    return 3.0 * h * w + x


@pytest.mark.parametrize("solver", [None, ps.Sequential(), ps.MultipleShooting(8)], ids=["auto", "loop", "8"])
@pytest.mark.parametrize("both", [False, True], ids=["forward", "both ways"])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("cell", [rooted, divided, exploding], ids=lambda cell: cell.name)
def test_padding_is_nothing_that_a_step_could_fail_at(cell, layers, both, solver):
    """Zeros have no logarithm, and what explodes on a repeated input is infinite where it is not looked at."""
    torch.manual_seed(0)
    layer = ps.RNN(cell, 4, 8, layers, bias=False, bidirectional=both, solver=solver, dtype=torch.float64)
    x, lengths = torch.randn(2, 900, 4, dtype=torch.float64), torch.tensor([20, 17])
    if cell is exploding:
        for w in layer.recurrent():
            w.data.fill_(0.9)
    y, h_n = layer(x, lengths=lengths)
    alone = [layer(x[i : i + 1, :n]) for i, n in enumerate(lengths.tolist())]
    for i, n in enumerate(lengths.tolist()):
        torch.testing.assert_close(y[i, :n], alone[i][0][0], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(h_n[:, i], alone[i][1][:, 0], rtol=1e-9, atol=1e-9)
    weights = list(layer.parameters())
    got = torch.autograd.grad(y.sin().sum() + h_n.sum(), weights)
    want = torch.autograd.grad(torch.stack([y.sin().sum() + h.sum() for y, h in alone]).sum(), weights)
    torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_matrices_are_orthogonal_in_any_dtype(dtype):
    layer = ps.RNN(ps.cells.headgru, 8, 16, dtype=dtype)
    for name, p in layer.named_parameters():
        if name.startswith("weight_hh"):
            assert p.dtype == dtype
            products = p.double() @ p.double().mT
            torch.testing.assert_close(
                products, torch.eye(p.shape[-1], dtype=torch.float64).expand_as(products), rtol=0, atol=0.02
            )


def test_what_is_wrong_is_said_before_anything_runs():
    layer, x = ps.ParaGRU(4, 8), torch.randn(2, 9, 4)
    lengths = torch.tensor([9, 3])
    for reset in (torch.zeros(1, 9, dtype=torch.bool), torch.zeros(9, dtype=torch.bool), torch.zeros(2, 9)):
        with pytest.raises(ArgumentError, match=r"reset: got .*; expected a bool tensor of shape \(B, T\) = \(2, 9\)"):
            layer(x, reset=reset, lengths=lengths)
    with pytest.raises(ArgumentError, match=r"h_0: got .*int64.*; expected a floating dtype"):
        layer.step(x[:, 0], torch.zeros(1, 2, 1, 8, dtype=torch.int64))
    with pytest.raises(ArgumentTypeError, match="x_t: got list"):
        layer.step([1.0])  # type: ignore[arg-type]


@pytest.mark.parametrize("compiled", [False, True])
def test_weight_gradient_of_heads_lies_as_the_weight_does(compiled):
    """Else accumulating it takes one more copy."""
    layer = ps.RNN(ps.cells.gru, 8, 8, num_heads=2)
    strides = []
    weight: Any = layer.weight_ih_l0
    weight.register_hook(lambda grad: strides.append(grad.stride()))
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = (torch.compile(layer) if compiled else layer)(torch.randn(2, 5, 8))
    y.float().sum().backward()
    assert strides == [weight.stride()]


@ps.cell
def turned(a: ps.State, b: ps.State, x: ps.Input, w: ps.Param):
    u, v = a + w * x * b, b - w * x * a
    n = torch.sqrt(u * u + v * v)  # a point of the circle, never zero if it was none
    return u / n, v / n


@ps.cell
def growing(h: ps.State, x: ps.Input, p: ps.Param):
    return torch.exp(x) * h + p


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("solver", [None, ps.MultipleShooting(8)], ids=["auto", "8"])
@pytest.mark.parametrize("cell", [turned, growing], ids=lambda cell: cell.name)
def test_padding_after_given_states_is_nothing_that_fails(cell, solver, masked):
    """From zero one step has no derivative, though no sequence was ever there; the other overflows when the last input goes on."""
    torch.manual_seed(0)
    layer, states = ps.RNN(cell, 3, 2, solver=solver, dtype=torch.float64), len(cell.states)
    x, h_0 = torch.randn(2, 2000, 3, dtype=torch.float64), torch.ones(1, 2, states, 2, dtype=torch.float64)
    if cell is growing:
        with torch.no_grad():
            layer.get_parameter("bias_l0").fill_(-0.5)
            layer.get_parameter("weight_ih_l0").fill_(1.0)
            x[0], x[1, 11] = x[0] * 0.1, 1.0  # exp(2.5) a step, from there on
    lengths = torch.tensor([2000, 12])
    reset = torch.zeros(2, 2000, dtype=torch.bool)
    reset[1, 20:] = masked  # beyond its end
    weights = list(layer.parameters())
    got = torch.autograd.grad(layer(x, h_0, reset=reset, lengths=lengths)[0].sum(), weights)
    alone = [layer(x[b : b + 1, :n], h_0[:, b : b + 1])[0].sum() for b, n in enumerate(lengths.tolist())]
    torch.testing.assert_close(got, torch.autograd.grad(torch.stack(alone).sum(), weights), rtol=1e-9, atol=1e-9)


def test_shapes_without_storage():
    y, h_n = ps.ParaGRU(6, 8, 2, device="meta")(torch.empty(2, 256, 6, device="meta"))
    assert (y.shape, h_n.shape, y.device.type) == ((2, 256, 8), (2, 2, 1, 8), "meta")
