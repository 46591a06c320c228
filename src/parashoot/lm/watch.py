"""Looks inside a model while it runs a batch: how its recurrent layers were solved, and where numbers stop being finite."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..cell import Cell
from ..diagnostics import lyapunov_exponents
from ..scan import scan


@torch.no_grad()
def solver_statistics(
    model: Any, ids: Tensor, reset: Tensor | None, *, exponents: bool = False
) -> list[dict[str, float]]:
    """For each recurrent layer, on the batch ids (B, T): sweeps of the slowest sequence and on average, and the final defect.

    With `exponents` also the largest Lyapunov exponent, which takes a loop over time.
    """
    found: list[dict[str, float]] = []
    layers = model.recurrent_layers()
    if not layers:
        return []
    for layer in layers:
        layer._scan = partial(_recorded, found, exponents)  # type: ignore[method-assign]
    try:
        with torch.compiler.set_stance("force_eager"):
            model(input_ids=ids, reset=reset, logits_to_keep=1)
    finally:
        for layer in layers:
            del layer._scan
    return found


def _recorded(
    found: list[dict[str, float]], exponents: bool, cell: Cell, x: Tensor, params: Any, h0: Tensor, **options: Any
) -> tuple[Tensor, Tensor]:
    y, h_n, info = scan(cell, x, params, h0, **options, return_info=True)
    facts = {name: float(getattr(info, name)) for name in ("iterations", "iterations_mean", "defect")}
    found.append(facts | ({"lyapunov": float(lyapunov_exponents(cell, x, params, h0).max())} if exponents else {}))
    return y, h_n


def first_non_finite(model: nn.Module, run: Callable[[], Any]) -> str | None:
    """The name of the first module to give a number that is not finite while `run` runs `model`; None: none does."""
    found: list[str] = []

    def check(name: str, module: nn.Module, inputs: Any, outputs: Any) -> None:
        tensors = outputs if isinstance(outputs, (tuple, list)) else [outputs]
        if not found and not all(bool(t.isfinite().all()) for t in tensors if isinstance(t, Tensor)):
            found.append(name)

    hooks = [m.register_forward_hook(partial(check, name)) for name, m in model.named_modules() if name]
    try:
        with torch.compiler.set_stance("force_eager"):
            run()
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else None


def last_non_finite_gradient(model: nn.Module) -> str | None:
    """The parameter nearest to the output whose gradient is not finite, where backward began to fail; None: there is none."""
    for name, p in reversed(list(model.named_parameters())):
        grad = p.grad.to_local() if hasattr(p.grad, "to_local") else p.grad  # type: ignore[union-attr]
        if grad is not None and not bool(grad.isfinite().all()):
            return name
    return None
