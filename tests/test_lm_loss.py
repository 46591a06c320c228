"""The kernel of the loss against its formula in float64: in Triton's interpreter without a GPU."""

from __future__ import annotations

import pytest
import torch

from oracle import relative

pytest.importorskip("triton")
from parashoot.triton import cross_entropy
from parashoot.triton.cross_entropy import run_score

ON_GPU = torch.cuda.is_available()
DEVICE = "cuda" if ON_GPU else "cpu"
pytestmark = [pytest.mark.gpu] if ON_GPU else []
IGNORED = -100


def by_formula(
    logits: torch.Tensor, targets: torch.Tensor, z: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The sums of loss and z-loss, and the gradient of the former, by autograd in float64."""
    leaf = logits.double().requires_grad_()
    rows = targets != IGNORED
    lse = leaf[rows].logsumexp(-1)
    square = (z * lse.square()).sum()
    loss = (lse - leaf[rows].gather(1, targets[rows, None])[:, 0]).sum() + square
    return loss.detach(), square.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("vocabulary", [1, 31, 32, 33, 100])
def test_the_kernel_gives_the_loss_and_its_gradient(vocabulary, monkeypatch):
    monkeypatch.setattr(cross_entropy, "BLOCK", 32)  # several blocks a row, the last one cut off
    logits = torch.randn(7, vocabulary, device=DEVICE) * 5
    if vocabulary == 100:
        logits[3, :40] = -torch.inf  # a block without any finite number
    targets = torch.randint(vocabulary // 2, vocabulary, (7,), device=DEVICE)
    targets[1] = IGNORED
    loss, square, gradient = by_formula(logits, targets, 0.1)
    kept = logits.clone()
    found = run_score(logits, targets, 0.1, IGNORED, False)
    assert torch.equal(logits, kept), "without gradients the logits stay as they are"
    got = run_score(logits, targets, 0.1, IGNORED, True)
    for one, want in zip((*found, *got), (loss, square) * 2, strict=True):
        assert abs(float(one) - float(want)) <= 1e-6 * max(1.0, abs(float(want)))
    assert relative(logits.double(), gradient) < 2e-6
    assert bool((logits[1] == 0).all()), "what is not scored has no gradient"


def test_rows_may_lie_apart_and_be_short():
    wide = torch.randn(5, 64, device=DEVICE).to(torch.bfloat16)
    logits, targets = wide[:, :50], torch.randint(0, 50, (5,), device=DEVICE)
    loss, _, gradient = by_formula(logits, targets, 0.0)
    beside = wide[:, 50:].clone()
    got, _ = run_score(logits, targets, 0.0, IGNORED, True)
    assert abs(float(got) - float(loss)) < 1e-5 * float(loss)
    assert float((logits.double() - gradient).abs().max()) < 4e-3, "rounded to bfloat16 once"
    assert torch.equal(wide[:, 50:], beside)


@pytest.mark.parametrize("target", [8, 9, -1, -101])
def test_a_target_outside_the_vocabulary_is_no_number(target):
    logits = torch.randn(3, 8, device=DEVICE)
    loss, _ = run_score(logits, torch.tensor([2, target, IGNORED], device=DEVICE), 0.0, IGNORED, True)
    assert bool(loss.isnan()) and logits.isnan().any(1).tolist() == [False, True, False]


def test_what_is_no_number_stays_visible():
    logits = torch.randn(2, 40, device=DEVICE)
    logits[0, 7] = torch.nan
    loss, _ = run_score(logits, torch.zeros(2, dtype=torch.int64, device=DEVICE), 0.0, IGNORED, True)
    assert bool(loss.isnan()) and bool(logits[0].isnan().all()) and bool(logits[1].isfinite().all())
