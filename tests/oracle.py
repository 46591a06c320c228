"""What the tests measure against: for-loops over the plain step, and random problems for them.

Nothing here uses the library's tracing, layouts or solvers: only the step itself, its structure and its parameter shapes.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import parashoot as ps
from parashoot.cell import parameter_shapes

STRUCTURES = ("channelwise", "headwise", "dense")
SHIPPED = {name: getattr(ps.cells, name) for name in ps.cells.__all__}
CELLS = SHIPPED | {
    c.name: c.with_width(4) for c in (ps.cells.headgru, ps.cells.headlstm, ps.cells.headrotor)
}  # two heads at C = 8
ONE_OF_EACH = {"channelwise": CELLS["lstm"], "headwise": CELLS["headgru"], "dense": CELLS["elman"]}


def split(cell: ps.Cell, v: Tensor) -> Tensor:
    """The last axis C as (H, n) for a headwise cell."""
    return v.unflatten(-1, (-1, cell.width)) if cell.width else v


def step(cell: ps.Cell, state: Tensor, inputs: Tensor, params: Sequence[Tensor]) -> Tensor:
    """One step of states (B, S, C) on inputs (B, G, C): the plain function, slots stacked again."""
    seen = [split(cell, p) if p.dim() == 1 else p for p in params]
    new = cell.step(*split(cell, state).unbind(1), *split(cell, inputs).unbind(1), *seen)
    new = [new] if isinstance(new, Tensor) else new
    return torch.stack([(v.flatten(-2) if cell.width else v).expand_as(state[:, 0]) for v in new], 1)


def loop(cell: ps.Cell, x: Tensor, params: Sequence[Tensor], h0: Tensor, reset: Tensor | None = None) -> Tensor:
    """All states (B, T, S, C) of h_t = f(h_{t-1}, x_t), one step after the other; a reset zeroes the entering state."""
    state, states = h0, []
    for t, inputs in enumerate(x.unbind(1)):
        if reset is not None:
            state = torch.where(reset[:, t, None, None], torch.zeros_like(state), state)
        state = step(cell, state, inputs, params)
        states.append(state)
    return torch.stack(states, 1)


def loop_reversed(
    cell: ps.Cell, x: Tensor, params: Sequence[Tensor], h0: Tensor, reset: Tensor | None = None
) -> Tensor:
    """The same from t = T-1 down to 0, states in time order; `reset[:, t]` cuts between t-1 and t, so on the way from t."""
    state, states = h0, []
    for t, inputs in reversed(list(enumerate(x.unbind(1)))):
        state = step(cell, state, inputs, params)
        states.insert(0, state)
        if reset is not None:
            state = torch.where(reset[:, t, None, None], torch.zeros_like(state), state)
    return torch.stack(states, 1)


def random_problem(
    cell: ps.Cell,
    batch: int,
    time: int,
    channels: int,
    sigma: float = 1.0,
    dtype: torch.dtype = torch.float64,
    seed: int = 0,
) -> tuple[Tensor, list[Tensor], Tensor]:
    """x ~ N(0, 1) (B, T, G, C), recurrent weights ~ sigma N(0, 1) (matrices over sqrt(n)), and h0 (B, S, C).

    h0 is positive, so that a normalizer slot is one. Drawn in fp64 and rounded, so dtypes share a problem.
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
    x = draw(batch, time, len(cell.inputs), channels)
    params = [sigma * draw(*s) / (s[-1] ** 0.5 if len(s) > 1 else 1.0) for s in parameter_shapes(cell, channels)]
    h0 = 0.2 + 0.6 * torch.rand(batch, len(cell.states), channels, generator=generator, dtype=torch.float64)
    return x.to(dtype), [p.to(dtype) for p in params], h0.to(dtype)


def random_resets(batch: int, time: int, seed: int = 0, share: float = 0.1) -> Tensor:
    """A random bool (B, T)."""
    return torch.rand(batch, time, generator=torch.Generator().manual_seed(seed)) < share


def leaves(*tensors: Tensor) -> list[Tensor]:
    """Fresh leaves that require gradients."""
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradients(
    run: Callable, x: Tensor, params: Sequence[Tensor], h0: Tensor, dy: Tensor | None, dh: Tensor | None
) -> list[Tensor]:
    """Gradients by x, each parameter and h0 of `run(x, params, h0) -> (y, h_n)` under cotangents dy and dh (either None)."""
    x, h0, *params = leaves(x, h0, *params)
    pairs = [(v, g) for v, g in zip(run(x, params, h0), (dy, dh), strict=True) if g is not None]
    found = torch.autograd.grad([v for v, _ in pairs], [x, *params, h0], [g for _, g in pairs], allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for leaf, g in zip([x, *params, h0], found, strict=True)]


def by_loop(cell: ps.Cell, reset: Tensor | None = None, reverse: bool = False) -> Callable:
    """`(x, params, h0) -> (y, h_n)` by the loop."""

    def run(x: Tensor, params: Sequence[Tensor], h0: Tensor) -> tuple[Tensor, Tensor]:
        states = (loop_reversed if reverse else loop)(cell, x, params, h0, reset)
        return states[:, :, cell.output], states[:, 0 if reverse else -1]

    return run


def relative(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest value wanted."""
    scale = float(want.abs().max())
    return float((got.double() - want.double()).abs().max()) / (scale if scale > 0 else 1.0)
