"""The Elman network with diagonal recurrence. Source: Elman 1990; diagonal as in IndRNN, Li et al. 2018 (arXiv 1803.04831).

h' = tanh(a h + x)
"""

import torch

from ..cell import Input, Param, State, cell


@cell
def elman_diagonal(h: State, x: Input, a: Param):
    return torch.tanh(a * h + x)
