"""One recurrent layer of a model, timed three ways on the same input: in parallel over time, step by step, and as plain PyTorch."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layers import RNN
from ..plan import Sequential
from .model import ParaRNNForCausalLM


@dataclass(frozen=True)
class Speed:
    """Milliseconds for forward and backward of one layer, B = 1: `parallel` as `ps.scan` plans it, `sequential` with
    `ps.Sequential()`, `loop` by autograd through a Python loop over the step; `error` = max |parallel - loop|."""

    length: int
    channels: int
    parallel: float
    sequential: float
    loop: float
    error: float

    def __str__(self) -> str:
        return (
            f"one recurrent layer, forward and backward, 1 sequence x {self.length} steps x {self.channels} channels, "
            f"{torch.get_num_threads()} CPU threads:\n"
            f"  parallel over time        {self.parallel:8.1f} ms\n"
            f"  ps.Sequential()           {self.sequential:8.1f} ms   the parallel pass is {self.sequential / self.parallel:.1f}x faster\n"
            f"  autograd through the loop {self.loop:8.1f} ms   the parallel pass is {self.loop / self.parallel:.1f}x faster\n"
            f"  largest difference between the outputs of the first and the last: {self.error:.1e}"
        )


def layer_speed(model: ParaRNNForCausalLM, tokens: Tensor, repeats: int = 5) -> Speed:
    """Time the first layer of `model` on what it receives for `tokens` (T,), on the CPU; medians of interleaved runs."""
    layer, x = _first_layer(model, tokens)
    leaves = [x, *layer.parameters()]
    solver = layer.solver

    def with_solver(value: Sequential | None) -> Callable[[], Tensor]:
        def run() -> Tensor:
            layer.solver = value
            return layer(x)[0]

        return run

    runs = [with_solver(None), with_solver(Sequential()), lambda: plain_loop(layer, x)]
    outputs = [_timed(run, leaves)[1] for run in runs]
    times = [[_timed(run, leaves)[0] for run in runs[:2]] for _ in range(repeats)]
    loops = [_timed(runs[2], leaves)[0] for _ in range(3)]
    layer.solver = solver
    parallel, sequential = (statistics.median(column) for column in zip(*times, strict=True))
    error = float((outputs[0] - outputs[2]).abs().max())
    return Speed(x.shape[1], layer.hidden_size, parallel * 1e3, sequential * 1e3, statistics.median(loops) * 1e3, error)


def plain_loop(layer: RNN, x: Tensor) -> Tensor:
    """The layer as a user of plain PyTorch would write it: one projection of x (B, T, D), then a loop over `cell.step`."""
    cell, heads, gates = layer.cell, layer.num_heads, len(layer.cell.inputs)
    weight = layer.get_parameter("weight_ih_l0")
    z = torch.einsum("bthi,hoi->btho", x.unflatten(-1, (heads, -1)), weight)
    z = z.unflatten(-1, (gates, -1)).transpose(2, 3).flatten(3)
    if layer.bias:
        z = z + layer.get_parameter("bias_l0")
    params = layer.recurrent()
    if cell.width:
        z = z.unflatten(-1, (-1, cell.width))
        params = [p.unflatten(0, (-1, cell.width)) if p.dim() == 1 else p for p in params]
    states, outputs = (torch.zeros_like(z[:, 0, 0]),) * len(cell.states), []
    for inputs in z.unbind(1):
        states = cell.new_states(states, inputs.unbind(1), params)
        outputs.append(states[cell.output])
    y = torch.stack(outputs, 1)
    return y.flatten(-2) if cell.width else y


def _first_layer(model: ParaRNNForCausalLM, tokens: Tensor) -> tuple[RNN, Tensor]:
    """The first recurrent layer and its input (1, T, D) for `tokens` (T,)."""
    layer = model.recurrent_layers()[0]
    seen: list[Tensor] = []
    hook = layer.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    with torch.no_grad():
        model(tokens[None])
    hook.remove()
    return layer, seen[0].detach().flatten(2).clone().requires_grad_()


def _timed(run: Callable[[], Tensor], leaves: list[Tensor]) -> tuple[float, Tensor]:
    start = time.perf_counter()
    y = run()
    torch.autograd.grad(y, leaves, torch.ones_like(y))
    return time.perf_counter() - start, y.detach()
