"""ParaGRU: a GRU whose recurrence is diagonal. Source: Danieli et al. 2025 (ParaRNN, arXiv 2510.21450), after Cho et al. 2014.

z = sigmoid(a_z h + z),  r = sigmoid(a_r h + r),  c = tanh(a_c (r h) + c),  h' = (1 - z) h + z c
"""

import torch

from ..cell import Input, Param, State, cell


@cell
def gru(h: State, z: Input, r: Input, c: Input, a_z: Param, a_r: Param, a_c: Param):
    z = torch.sigmoid(a_z * h + z)
    r = torch.sigmoid(a_r * h + r)
    return h + z * (torch.tanh(a_c * (r * h) + c) - h)
