"""A cell for comparison, under its path "parashoot.tasks.cells:mingru_negative"."""

import torch

from ..cell import Input, State, cell


@cell
def mingru_negative(h: State, z: Input, c: Input):
    """minGRU with a gate between -1 and 1: z = 2 sigmoid(z), h' = (1 - z) h + z c. Source: Grazzi et al. 2024 (arXiv 2411.12537)."""
    return h + 2 * torch.sigmoid(z) * (c - h)
