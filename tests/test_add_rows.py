"""The sum over rows of partial sums, in Triton's interpreter without a GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from oracle import relative

pytest.importorskip("triton")
from parashoot.triton import add_rows

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []


@pytest.mark.parametrize("shape", [(1, 7), (3, 5, 16), (128, 8), (300, 9), (2, 4100)])
def test_each_column_by_itself(shape):
    parts = torch.randn(shape, device=DEVICE)
    got = add_rows.run(parts)
    assert got.shape == parts.shape[1:]
    assert relative(got.double(), parts.double().sum(0)) < 1e-6


def test_what_is_not_finite_stays_in_its_column():
    parts = torch.randn(200, 12, device=DEVICE)
    parts[150, 3], parts[7, 10] = torch.inf, torch.nan
    assert (~add_rows.run(parts).isfinite()).nonzero().flatten().tolist() == [3, 10]


@pytest.mark.gpu
@pytest.mark.skipif(not ON_GPU, reason="no GPU")
@pytest.mark.parametrize("shape", [(256, 5, 1024), (2049, 1024), (528, 1023), (16, 8)])
def test_however_it_is_summed(shape):
    parts = torch.randn(shape, device=DEVICE)
    assert relative(add_rows.add_rows(parts).double(), parts.double().sum(0)) < 1e-6
