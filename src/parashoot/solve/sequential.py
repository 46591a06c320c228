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
    if cell.width:
        heads = (-1, cell.width)
        given = [p.unflatten(0, heads) if p.dim() == 1 else p for p in given]
        x = x.unflatten(-1, heads)
        h0 = None if h0 is None else h0.unflatten(-1, heads)
    batch, time, gates = x.shape[:3]
    shape = (batch, *x.shape[3:])
    state = (x.new_zeros(shape),) * len(cell.states) if h0 is None else h0.unbind(1)
    wanted = range(len(cell.states)) if return_states else (cell.output,)
    inputs = x.flatten(1, 2).unbind(1)  # one node of the autograd graph, not one a step
    records = [[] for _ in wanted]
    for t in reversed(range(time)) if reverse else range(time):
        boundary = t + 1 if reverse else t
        if reset is not None and boundary < time:
            blocked = reset[:, boundary].view(-1, *[1] * (len(shape) - 1))
            state = [v.masked_fill(blocked, 0.0) for v in state]
        state = cell.new_states(state, inputs[t * gates : (t + 1) * gates], given)
        for record, i in zip(records, wanted, strict=True):
            record.append(_sized(state[i], shape))
    ys = [torch.stack(r[::-1] if reverse else r, 1) for r in records]
    last = [_sized(v, shape) for v in state]
    last = torch.stack(last, 1) if len(last) > 1 else last[0].unsqueeze(1)
    y = torch.stack(ys, 2) if return_states else ys[0]
    return (y.flatten(-2), last.flatten(-2)) if cell.width else (y, last)


def _sized(v: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A state that does not depend on its sequence, spread over all."""
    return v if v.shape == shape else v.expand(shape)
