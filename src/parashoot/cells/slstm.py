"""sLSTM with diagonal recurrence: exponential input gate, normalizer n, stabilizer m. Source: Beck et al. 2024 (xLSTM, arXiv 2405.04517).

i = i + r_i h,  f = log sigmoid(f + r_f h),  m' = max(f + m, i),  c' = e^(f + m - m') c + e^(i - m') tanh(z + r_z h),
n' = e^(f + m - m') n + e^(i - m'),  h' = sigmoid(o + r_o h) c' / n'
"""

import torch
from torch.nn.functional import logsigmoid

from ..cell import Input, Param, State, cell


@cell
def slstm(c: State, n: State, m: State, h: State, i: Input, f: Input, z: Input, o: Input,
          r_i: Param, r_f: Param, r_z: Param, r_o: Param):  # fmt: skip
    i = i + r_i * h
    f = logsigmoid(f + r_f * h) + m
    m = torch.maximum(f, i)
    keep, write = torch.exp(f - m), torch.exp(i - m)
    c = keep * c + write * torch.tanh(z + r_z * h)
    n = keep * n + write
    return c, n, m, torch.sigmoid(o + r_o * h) * c / torch.clamp(n, min=1e-6)
