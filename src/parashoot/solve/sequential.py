"""The for-loop: the definition that everything else is measured against, and single steps for decoding."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..cell import Cell


def advance(cell: Cell, state: Tensor, inputs: Tensor, params: Sequence[Tensor]) -> Tensor:
    """One step of a batch: state (B, S, C), inputs (B, G, C) -> new state (B, S, C). Plain autograd, dtypes as they come."""
    if not cell.width:
        return torch.stack(
            [v.expand_as(state[:, 0]) for v in cell.new_states(state.unbind(1), inputs.unbind(1), params)], 1
        )
    heads = (-1, cell.width)
    params = [p.unflatten(0, heads) if p.dim() == 1 else p for p in params]
    new = cell.new_states(state.unflatten(-1, heads).unbind(1), inputs.unflatten(-1, heads).unbind(1), params)
    return torch.stack([v.flatten(-2).expand_as(state[:, 0]) for v in new], 1)


def loop(
    cell: Cell,
    x: Tensor,
    params: Tensor | Sequence[Tensor] | None,
    h0: Tensor | None = None,
    *,
    reset: Tensor | None = None,
    reverse: bool = False,
    return_states: bool = False,
) -> tuple[Tensor, Tensor]:
    """`ps.scan` as a Python loop under autograd: same arguments and results, T dependent steps, no checks."""
    given = [] if params is None else list(params)
    time = x.shape[1]
    state = x.new_zeros(x.shape[0], len(cell.states), x.shape[3]) if h0 is None else h0
    states: list[Tensor] = []
    for t in reversed(range(time)) if reverse else range(time):
        boundary = t + 1 if reverse else t
        if reset is not None and boundary < time:
            state = state.masked_fill(reset[:, boundary, None, None], 0.0)
        state = advance(cell, state, x[:, t], given)
        states.append(state)
    ys = torch.stack(states[::-1] if reverse else states, 1)
    return ys if return_states else ys[:, :, cell.output], state
