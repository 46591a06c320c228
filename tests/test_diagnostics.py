"""verify and explain: they pass what agrees, fail what does not, and estimate exponents that are known."""

import math

import pytest
import torch

import parashoot as ps
from oracle import CELLS


@pytest.mark.parametrize("name", CELLS)
def test_shipped_cells_pass(name: str):
    report = ps.verify(CELLS[name], torch.randn(2, 70, len(CELLS[name].inputs), 8))
    assert report.passed
    assert report.output_error < 1e-5
    assert report.to_dict()["name"] == CELLS[name].name
    assert "gradient error" in str(report)


@pytest.mark.parametrize(
    "layer", [ps.ParaLSTM(6, 8, 2, bidirectional=True), ps.ParaGRU(6, 8, num_heads=2)], ids=["both ways", "heads"]
)
def test_layer_passes(layer):
    assert ps.verify(layer, torch.randn(2, 40, 6)).passed


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer", [ps.ParaGRU, ps.ParaLSTM])
def test_a_narrow_layer_passes(layer, dtype):
    """What its projections round is rounded in the loop too."""
    torch.manual_seed(0)
    assert ps.verify(layer(64, 64, 2, dtype=dtype), torch.randn(2, 100, 64).to(dtype)).passed


def test_parameters_as_one_tensor():
    assert ps.verify(ps.cells.gru, torch.randn(1, 8, 3, 4), torch.randn(3, 4)).passed


def test_loose_tolerance_fails():
    @ps.cell
    def slow(h: ps.State, x: ps.Input):
        return torch.sin(h + 0.1 * x)

    loose = ps.MultipleShooting(4, tol=0.5)
    assert not ps.verify(slow, torch.randn(1, 200, 1, 4), solver=loose).passed


def test_lyapunov_exponent_of_a_linear_cell_is_the_log_of_its_rate():
    @ps.cell
    def linear(h: ps.State, x: ps.Input, a: ps.Param):
        return a * h + x

    rates = torch.tensor([[0.5, -0.9, 1.01]])
    found = ps.lyapunov_exponents(linear, torch.randn(2, 50, 1, 3), rates)
    torch.testing.assert_close(found, rates.abs().log().double().expand(2, 3))


def test_lyapunov_exponent_of_a_rotation_is_zero():
    @ps.cell(structure="dense")
    def rotation(h: ps.State, x: ps.Input, W: ps.Param):
        return h @ W.mT + x

    turn = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]])
    found = ps.lyapunov_exponents(rotation, torch.randn(1, 400, 1, 2), (turn,))
    assert abs(float(found)) < 0.01


def test_explain_says_what_will_run():
    text = str(ps.explain(ps.cells.gru, torch.randn(1, 4096, 3, 64)))
    assert "channelwise" in text
    assert "chunks" in text
    assert "elman" in str(ps.explain(ps.cells.elman, torch.randn(1, 32, 1, 8), solver=ps.Sequential()))


def test_verify_refuses_other_things():
    with pytest.raises(ps.ArgumentTypeError, match="cell_or_layer"):
        ps.verify(torch.nn.GRU(3, 3), torch.randn(1, 3, 3))


@pytest.mark.parametrize("name", CELLS)
def test_what_is_compared_with_the_loop_is_not_the_loop(name: str):
    cell = CELLS[name]
    x = torch.randn(2, 64, len(cell.inputs), 8)
    assert ps.verify(cell, x).chunk_length < 64
    assert ps.verify(ps.RNN(cell, 8, 8), torch.randn(2, 64, 8)).chunk_length < 64
    assert ps.verify(cell, x, solver=ps.Sequential()).chunk_length == 64
    mine = ps.MultipleShooting(tol=1e-6, jacobian="auto")
    assert ps.verify(ps.RNN(cell, 8, 8, solver=mine), torch.randn(2, 64, 8)).chunk_length < 64
    assert ps.verify(cell, x, solver=ps.MultipleShooting(64)).chunk_length == 64


def test_gradients_that_are_no_numbers_fail():
    """The square of the parameter underflows in float32, and the root has no derivative at zero."""

    @ps.cell
    def rooted(h: ps.State, x: ps.Input, p: ps.Param):
        return torch.tanh(0.5 * h + x + torch.sqrt(p * p))

    report = ps.verify(rooted, torch.randn(2, 300, 1, 4), torch.full((1, 4), 1e-25))
    assert math.isnan(report.gradient_error)
    assert not report.passed


def test_parameters_are_drawn_as_the_cell_computes():
    before = torch.get_default_dtype()
    try:
        torch.set_default_dtype(torch.float64)
        assert ps.verify(ps.cells.gru, torch.randn(1, 40, 3, 4, dtype=torch.float32)).passed
    finally:
        torch.set_default_dtype(before)
