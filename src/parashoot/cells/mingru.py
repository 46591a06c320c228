"""minGRU: gates that do not see the state, so the recurrence is linear. Source: Feng et al. 2024 (arXiv 2410.01201).

z = sigmoid(z),  h' = (1 - z) h + z c
"""

import torch

from ..cell import Input, State, cell


@cell
def mingru(h: State, z: Input, c: Input):
    return h + torch.sigmoid(z) * (c - h)
