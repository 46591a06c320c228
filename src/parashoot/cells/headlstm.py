"""An LSTM in small dense heads: the 8 channels of a head mix inside the step. `headlstm.with_width(n)` gives other widths.

    i = sigmoid(R_i h + i),  f = sigmoid(R_f h + f),  z = tanh(R_z h + z),  o = sigmoid(R_o h + o),  c' = f c + i z,  h' = o tanh(c')

Source: Hochreiter and Schmidhuber 1997, with block-diagonal recurrence as in FlashRNN (Poeppel et al. 2025, arXiv 2412.07752).
"""

import torch

from ..cell import Input, Param, State, cell
from .headgru import mix


@cell(structure="headwise", width=8)
def headlstm(
    c: State, h: State, i: Input, f: Input, z: Input, o: Input, R_i: Param, R_f: Param, R_z: Param, R_o: Param
):
    i = torch.sigmoid(mix(R_i, h) + i)
    f = torch.sigmoid(mix(R_f, h) + f)
    z = torch.tanh(mix(R_z, h) + z)
    o = torch.sigmoid(mix(R_o, h) + o)
    c = f * c + i * z
    return c, o * torch.tanh(c)
