"""Cells of a module with postponed annotations, for test_cell.py: importable, so that they can be pickled."""

from __future__ import annotations

import torch

import parashoot as ps

RATE = 0.5


@ps.cell(output="c")
def postponed(c: ps.State, h: ps.State, x: ps.Input, w: ps.Param) -> tuple[torch.Tensor, torch.Tensor]:
    """Annotations are strings here."""
    return torch.tanh(w * c + h), torch.sigmoid(x + h)


@ps.cell(structure="headwise", width=2)
def heads(h: ps.State, x: ps.Input, R: ps.Param):
    return torch.tanh(torch.einsum("hij,...hj->...hi", R, h) + x)


def nested(scale: float):
    @ps.cell
    def inner(h: ps.State, x: ps.Input):
        return torch.tanh(scale * h + x)

    return inner
