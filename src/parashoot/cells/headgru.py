"""A GRU in small dense heads: the 8 channels of a head mix inside the step. `headgru.with_width(n)` gives other widths.

    z = sigmoid(R_z h + z),  r = sigmoid(R_r h + r),  c = tanh(R_c (r h) + c),  h' = (1 - z) h + z c

Source: Cho et al. 2014, with block-diagonal recurrence as in FlashRNN (Poeppel et al. 2025, arXiv 2412.07752).
"""

import torch

from ..cell import Input, Param, State, cell


def mix(R: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """R h for each head: R (H, n, n), h (..., H, n)."""
    return torch.einsum("hij,...hj->...hi", R, h)


@cell(structure="headwise", width=8)
def headgru(h: State, z: Input, r: Input, c: Input, R_z: Param, R_r: Param, R_c: Param):
    z = torch.sigmoid(mix(R_z, h) + z)
    r = torch.sigmoid(mix(R_r, h) + r)
    return h + z * (torch.tanh(mix(R_c, r * h) + c) - h)
