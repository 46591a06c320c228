"""The Elman network: every channel sees every other. Source: Elman 1990.

h' = tanh(W h + x)
"""

import torch

from ..cell import Input, Param, State, cell


@cell(structure="dense")
def elman(h: State, x: Input, W: Param):
    return torch.tanh(h @ W.mT + x)
