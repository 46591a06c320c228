"""Other people's contestants: cuDNN, and packages from PyPI, each left out by name where it is not installed."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..solve.sequential import loop
from . import recurrences
from .case import Case, problem
from .contest import Contestant, Entry, Skip, Truth
from .ours import PART

PROJECTED = 64  # width of the input that pararnn-torch's layer projects to gates: narrow, so that little is subtracted
HEAD = 128  # width of the gated delta rule's heads
SMALL_HEAD = 32  # width of FlashRNN's dense heads

Enter = Callable[[Case, torch.device], Entry]


def cudnn(kind: str) -> Enter:
    """`torch.nn.GRU` or `LSTM` with C inputs: a dense recurrence, its input projection included in the time."""

    def enter(case: Case, device: torch.device) -> Entry:
        if device.type != "cuda":
            raise Skip("cuDNN needs a GPU")
        layer = getattr(nn, kind)(case.channels, case.channels, batch_first=True, device=device, dtype=case.storage)
        x, weights = _draw(case, device)((case.batch, case.time, case.channels)), tuple(layer.parameters())
        recurrence = recurrences.dense_gru if kind == "GRU" else recurrences.dense_lstm

        def truth(steps: int) -> Truth:
            part = lambda v: v[: PART[0], :steps]
            leaves = [part(x).detach(), *(w.detach() for w in weights)]
            return Truth(leaves, recurrence, part, lambda grads: [part(grads[0]), *grads[1:]])

        return Entry((x,), weights, lambda x: layer(x)[0], truth, case.batch * case.channels * x.itemsize)

    return enter


def pararnn(checked: bool) -> Enter:
    """pararnn-torch's cell on the case's gates and weights, as its layer runs it or without the layer's check of the residual."""
    names = {"gru": ("ParaGRU", "a_z a_r a_n"), "lstm": ("ParaLSTM", "a_f a_z a_o c_f c_o")}

    def enter(case: Case, device: torch.device) -> Entry:
        package = _package("pararnn", "pararnn-torch")
        logging.getLogger("pararnn").addHandler(logging.NullHandler())  # it reports every large residual
        kind, recurrent = names[case.cell]
        cell = getattr(package, kind)(
            PROJECTED, case.channels, max_recurrent_norm=None, device=device, dtype=case.storage
        )
        weights = [getattr(cell, name) for name in recurrent.split()]
        draw = _draw(case, device)
        with torch.no_grad():
            for mine, given in zip(weights, problem(case, device)[1], strict=True):
                mine.copy_(given)
            cell.W_x.weight.copy_(draw(cell.W_x.weight.shape) * PROJECTED**-0.5)
        x = draw((case.batch, case.time, PROJECTED))
        layer, slot = package.ParaRNN(cell).train(), getattr(cell, "hidden_slot", None)
        config = package.NewtonConfig(residual_fail=None)

        def run(x: Tensor) -> Tensor:
            if checked:
                return layer(x)
            y = package.newton_apply(cell, x, config)
            return y if slot is None else y[:, :, slot]

        def truth(steps: int) -> Truth:
            with torch.no_grad():
                gates = cell.W_x(x).unflatten(-1, (-1, case.channels))
            part = lambda v: v[: PART[0], :steps, ..., : PART[1]]
            cut = lambda ws: [w[: PART[1]] for w in ws]
            leaves = [v.detach().cpu() for v in (part(gates), *cut(weights))]
            return Truth(
                leaves,
                lambda x, *params: loop(case.step, x, params)[0],
                part,
                lambda grads: [None, *cut(grads[1 : 1 + len(weights)])],
            )

        gates = case.batch * case.time * len(case.step.inputs) * case.channels * x.itemsize
        projection = (cell.W_x.weight, cell.W_x.bias)
        return Entry(
            (x,), (*weights, *projection), run, truth, case.batch * case.channels * len(case.step.states) * x.itemsize, gates,
            extra=Entry((x,), projection, cell.W_x, truth),
        )  # fmt: skip

    return enter


def hgrn(case: Case, device: torch.device) -> Entry:
    """fla-core's `chunk_hgrn(x, g)`: h = e^g h + x, elementwise."""
    run = _package("fla.ops.hgrn", "fla-core", device).chunk_hgrn
    draw, shape = _draw(case, device), (case.batch, case.time, case.channels)
    x, g = draw(shape), draw(shape, nn.functional.logsigmoid)
    part = lambda steps: lambda v: v[: PART[0], :steps, : PART[1]]
    return _parallel((x, g), lambda x, g: run(x, g)[0], lambda x, g: recurrences.linear(g.exp(), x, 1), part, (0, 1))


def accelerated(case: Case, device: torch.device) -> Entry:
    """accelerated-scan's Triton kernel `scan(forget, inputs)`: h = forget h + inputs, in its own layout (B, C, T)."""
    run = _package("accelerated_scan.scalar", "accelerated-scan", device).scan
    draw, shape = _draw(case, device), (case.batch, case.channels, case.time)
    inputs = draw(shape, torch.sigmoid), draw(shape)
    part = lambda steps: lambda v: v[: PART[0], : PART[1], :steps]
    return _parallel(inputs, run, lambda decay, x: recurrences.linear(decay, x, 2), part, (0, 1))


def gated_delta(case: Case, device: torch.device) -> Entry:
    """fla-core's `chunk_gated_delta_rule`: a linear recurrence of a matrix state a head, C values in heads of `HEAD`."""
    run = _package("fla.ops.gated_delta_rule", "fla-core", device).chunk_gated_delta_rule
    if case.channels % HEAD:
        raise Skip(f"C = {case.channels} is no multiple of its head width, {HEAD}")
    draw, shape = _draw(case, device), (case.batch, case.time, case.channels // HEAD, HEAD)
    unit = lambda v: nn.functional.normalize(v.float(), dim=-1).to(v.dtype)
    inputs = (
        *(draw(shape, unit) for _ in range(2)),
        draw(shape),
        draw(shape[:3], lambda v: nn.functional.logsigmoid(v.float())),
        draw(shape[:3], torch.sigmoid),
    )
    part = lambda steps: lambda v: v[: PART[0], :steps, :1]
    return _parallel(inputs, lambda *a: run(*a)[0], recurrences.gated_delta, part, range(5))


def flashrnn(case: Case, device: torch.device) -> Entry:
    """FlashRNN's LSTM by its Triton kernels (its CUDA ones are compiled at first use): dense heads of `SMALL_HEAD`, sequential."""
    run = _package("flashrnn", "flashrnn", device).flashrnn
    if case.channels % SMALL_HEAD:
        raise Skip(f"C = {case.channels} is no multiple of its head width, {SMALL_HEAD}")
    draw, heads = _draw(case, device), (case.channels // SMALL_HEAD, SMALL_HEAD)
    x = draw((case.batch, case.time, 4, *heads))
    w = draw((4, *heads, SMALL_HEAD), lambda v: v * case.sigma * SMALL_HEAD**-0.5)
    b = draw((4, *heads), torch.zeros_like)

    def forward(x: Tensor) -> Tensor:
        return run(x, w, b, function="lstm", backend="triton_fused", dtype=case.dtype)[0][0]

    def truth(steps: int) -> Truth:
        cut = lambda x, w, b: [x[: PART[0], :steps, :, :1], w[:, :1], b[:, :1]]
        leaves = [v.detach().cpu() for v in cut(x, w, b)]
        return Truth(leaves, recurrences.head_lstm, lambda y: y[: PART[0], :steps, :1], lambda grads: cut(*grads))

    return Entry((x,), (w, b), forward, truth, 2 * case.batch * case.channels * x.itemsize)


def _parallel(
    inputs: tuple[Tensor, ...], run: Callable[..., Tensor], recurrence: Callable[..., Tensor],
    part: Callable[[int], Callable[[Tensor], Tensor]], picked: Sequence[int],
) -> Entry:  # fmt: skip
    """An entry whose inputs and output are all cut alike, and that has no weights."""

    def truth(steps: int) -> Truth:
        cut = part(steps)
        return Truth(
            [cut(v).detach().cpu() for v in inputs], recurrence, cut, lambda grads: [cut(grads[k]) for k in picked]
        )

    return Entry(inputs, (), run, truth)


def _draw(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """`draw(shape, then)`: then(N(0, 1)) in the case's dtype, a leaf that requires gradients."""
    generator = torch.Generator(device).manual_seed(3)

    def draw(shape: Sequence[int], then: Callable[[Tensor], Tensor] = lambda v: v) -> Tensor:
        v = torch.randn(*shape, generator=generator, device=device, dtype=case.storage)
        return then(v).detach().requires_grad_()

    return draw


def _package(module: str, package: str, device: torch.device | None = None) -> Any:
    """An optional package's module. Raises `Skip` where it is missing, or where its kernels have no `device` to run on."""
    try:
        found = importlib.import_module(module)
    except ImportError as e:
        missing = (e.name or "").split(".")[0] == module.split(".")[0]
        raise Skip(f"not installed: pip install {package}" if missing else f"{package} cannot be imported: {e}") from e
    if device is not None and device.type != "cuda":
        raise Skip(f"the kernels of {package} need a GPU")
    return found


_NEWTON = "the same cell by Newton, 3 iterations; its input projection is timed alone and subtracted"
THEIRS = (
    Contestant("cudnn-gru", "torch.nn.GRU, dense recurrence", cudnn("GRU"), ("gru",), 2**14),
    Contestant("cudnn-lstm", "torch.nn.LSTM, dense recurrence", cudnn("LSTM"), ("lstm",), 2**14),
    Contestant("pararnn-torch", _NEWTON, pararnn(True), ("gru", "lstm"), package="pararnn-torch"),
    Contestant(
        "pararnn-torch-unchecked",
        f"{_NEWTON}; without its layer's check",
        pararnn(False),
        ("gru", "lstm"),
        package="pararnn-torch",
    ),
    Contestant("hgrn", "chunk_hgrn, a linear recurrence, elementwise", hgrn, ("gru", "mingru"), package="fla-core"),
    Contestant(
        "gated-delta",
        f"gated delta rule, linear, {HEAD} x {HEAD} states",
        gated_delta,
        ("gru", "mingru"),
        package="fla-core",
    ),
    Contestant(
        "accelerated-scan",
        "a linear recurrence, elementwise, time last",
        accelerated,
        ("gru", "mingru"),
        package="accelerated-scan",
    ),
    Contestant(
        "flashrnn", f"an LSTM in dense heads of {SMALL_HEAD}, sequential", flashrnn, ("lstm",), package="flashrnn"
    ),
)
