"""Heads whose state is a point of the unit sphere that the inputs turn, and may replace. `headrotor.with_width(n)` gives heads of n channels.

    s = F_a F_b F_c F_d (h + p),  F_k s = s - 2 k (k . s) / (k . k)
    z = sigmoid(R_z (h + p) + z - 5),  v = tanh(R_v (h + p) + v),  u = s + z (v - s),  h' = 2 u / (1 + u . u) - p

Two reflections turn the state in a plane, by twice the angle between their k: products of four reach every rotation in four dimensions. The gate
z, shut at first, forgets and writes. The last step returns to the sphere what strays from it. A sequence that starts from zero starts at p.

Source: products of Householder reflections that depend on the input as in Siems et al. 2025 (DeltaProduct, arXiv 2502.10297), here of a vector, in a
nonlinear gated step.
"""

import torch

from ..cell import Input, Param, State, cell
from .headgru import mix


def dot(u: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """u . v for each head: u, v (..., H, n) -> (..., H, 1)."""
    return (u * v).sum(-1, keepdim=True)


def reflect(s: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
    """s mirrored in the hyperplane across k, for each head."""
    return s - k * (2 * dot(k, s) / (dot(k, k) + 1e-6))


@cell(structure="headwise", width=8)
def headrotor(
    h: State, a: Input, b: Input, c: Input, d: Input, z: Input, v: Input, p: Param, R_z: Param, R_v: Param
):  # fmt: skip
    s = reflect(reflect(reflect(reflect(h + p, d), c), b), a)
    z = torch.sigmoid(mix(R_z, h + p) + z - 5)
    u = s + z * (torch.tanh(mix(R_v, h + p) + v) - s)
    return 2 * u / (1 + dot(u, u)) - p
