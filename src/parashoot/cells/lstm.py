"""ParaLSTM: diagonal recurrence, coupled input and forget gates, peepholes. Source: Danieli et al. 2025 (arXiv 2510.21450).

f = sigmoid(a_f h + p_f c + f),  z = tanh(a_z h + z),  c' = f c + (1 - f) z,
o = sigmoid(a_o h + p_o c' + o),  h' = o tanh(c')
"""

import torch

from ..cell import Input, Param, State, cell


@cell
def lstm(c: State, h: State, f: Input, z: Input, o: Input, a_f: Param, a_z: Param, a_o: Param, p_f: Param, p_o: Param):
    f = torch.sigmoid(a_f * h + p_f * c + f)
    z = torch.tanh(a_z * h + z)
    c = z + f * (c - z)
    o = torch.sigmoid(a_o * h + p_o * c + o)
    return c, o * torch.tanh(c)
