"""The contestants: the library, loops over the same cell, cuDNN, and packages from PyPI, skipped where not installed.

A recurrence that is not the case's cell is written here as a plain loop, the truth that its contestant is judged by.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import BackendError
from ..plan import MultipleShooting, compute_dtype
from ..scan import scan
from ..solve.sequential import loop
from .cases import Case, problem
from .trial import CHANNELS, SEQUENCES, STEPS, Contestant, Entry, Truth

UNROLLED = 16  # steps of the loop in one compiled graph
HEAD = 128  # width of the gated delta rule's heads
SMALL_HEAD = 32  # width of FlashRNN's dense heads
PARARNN = {"gru": ("ParaGRU", "a_z a_r a_n"), "lstm": ("ParaLSTM", "a_f a_z a_o c_f c_o")}  # class, recurrent weights


@lru_cache(maxsize=1)
def cell_truth(case: Case, device: torch.device) -> Truth:
    """The for-loop over the case's cell, shared by all who run that cell."""
    cell, (x, params) = case.step, problem(case, device)
    channels = case.channels if cell.structure == "dense" else CHANNELS
    part = lambda v: v[:SEQUENCES, :STEPS, ..., :channels]
    first = lambda p: p[: channels // p.shape[1] if p.dim() == 3 else channels]
    pick = lambda tensors: [part(tensors[0]), *map(first, tensors[1:])]
    return Truth(lambda x, *params: loop(cell, x, params)[0], [x, *params], part, pick)


def on_the_cell(case: Case, device: torch.device, run: Callable[[Tensor], Tensor], **options: Any) -> Entry:
    """An entry that runs the case's own cell on the problem's parameters (or on `weights`, copies of them)."""
    x, params = problem(case, device)
    return Entry((x,), run=run, truth=cell_truth(case, device), **{"weights": tuple(params), **options})


def by_scan(backend: str, case: Case, device: torch.device, *, chunks: bool = True) -> Entry:
    """`ps.scan` with one backend: generated kernels, or PyTorch operations; in chunks as planned, or in one."""
    params = problem(case, device)[1] or None
    solver = MultipleShooting("auto" if chunks else case.time, backend=backend)
    return on_the_cell(case, device, lambda x: scan(case.step, x, params, solver=solver)[0])


def by_loop(graph: bool, case: Case, device: torch.device) -> Entry:
    """The Python loop over the step, launched step by step or replayed from one CUDA graph."""
    if graph and device.type != "cuda":
        raise BackendError("needs a GPU")
    params = problem(case, device)[1]
    run = lambda x: loop(case.step, x, params, _start(case, x))[0].to(x.dtype)
    return on_the_cell(case, device, run, graph=graph)


def compiled(case: Case, device: torch.device) -> Entry:
    """The loop as `torch.compile` makes it, `UNROLLED` steps in a graph, the state handed from call to call."""
    params = problem(case, device)[1]
    torch.compiler.reset()  # graphs of earlier cases count towards the compiler's limit
    piece = torch.compile(lambda x, params, h: loop(case.step, x, params, h), dynamic=False, fullgraph=True)

    def run(x: Tensor) -> Tensor:
        h, ys = _start(case, x).requires_grad_(torch.is_grad_enabled()), []  # as in later pieces: one graph serves all
        for part in x.split(UNROLLED, 1):
            y, h = piece(part, params, h)
            ys.append(y)
        return torch.cat(ys, 1).to(x.dtype)

    return on_the_cell(case, device, run)


def _start(case: Case, x: Tensor) -> Tensor:
    """The zero state (B, S, C) in the compute dtype, which makes the whole loop compute in it."""
    return x.new_zeros(x.shape[0], len(case.step.states), x.shape[3], dtype=compute_dtype(x.dtype))


def cudnn(kind: str, case: Case, device: torch.device) -> Entry:
    """`torch.nn.GRU` or `LSTM` with C inputs: a dense recurrence, its input projection included in the time."""
    if device.type != "cuda":
        raise BackendError("needs a GPU")
    layer = getattr(nn, kind)(case.channels, case.channels, batch_first=True, device=device, dtype=case.storage)
    x, weights = _draw(case, device)(case.batch, case.time, case.channels), tuple(layer.parameters())
    part = lambda v: v[:SEQUENCES, :STEPS]
    pick = lambda tensors: [part(tensors[0]), *tensors[1:]]
    truth = Truth(lambda x, *weights: dense(kind, x, weights), (x, *weights), part, pick)
    return Entry((x,), weights, lambda x: layer(x)[0], truth)


def dense(kind: str, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
    """`torch.nn.GRU` or `LSTM` on x (B, T, D) as PyTorch's own loop over the steps, without cuDNN."""
    h = x.new_zeros(1, x.shape[0], weights[1].shape[1])
    options = (list(weights), True, 1, 0.0, True, False, True)  # with biases, one layer, ..., batch first
    with torch.backends.cudnn.flags(enabled=False):
        return torch.gru(x, h, *options)[0] if kind == "GRU" else torch.lstm(x, (h, h), *options)[0]


def pararnn(checked: bool, case: Case, device: torch.device) -> Entry:
    """pararnn-torch's cell, Newton with 3 iterations, on the case's gates and weights: as its layer runs it, which
    checks the residual, or without that check. Its input projection becomes the identity, forward and backward."""
    package = _package("pararnn", "pararnn-torch")
    logging.getLogger("pararnn").addHandler(logging.NullHandler())  # it reports every large residual
    _package("pararnn.solvers.vjp", "pararnn-torch")._linear_vjp = lambda layer, x, grad: (grad, None, None)
    (kind, recurrent), width = PARARNN[case.cell], len(case.step.inputs) * case.channels
    cell = getattr(package, kind)(width, case.channels, max_recurrent_norm=None, device=device, dtype=case.storage)
    cell.W_x = nn.Identity()
    weights = [getattr(cell, name) for name in recurrent.split()]
    with torch.no_grad():
        for mine, given in zip(weights, problem(case, device)[1], strict=True):
            mine.copy_(given)
    layer, slot = package.ParaRNN(cell).train(), getattr(cell, "hidden_slot", None)
    config = package.NewtonConfig(residual_fail=None)

    def unchecked(x: Tensor) -> Tensor:
        y = package.newton_apply(cell, x, config)
        return y if slot is None else y[:, :, slot]

    run = layer if checked else unchecked
    return on_the_cell(case, device, lambda x: run(x.flatten(2)), weights=tuple(weights))


def hgrn(case: Case, device: torch.device) -> Entry:
    """fla-core's `chunk_hgrn(x, g)`: h = e^g h + x, elementwise."""
    run = _package("fla.ops.hgrn", "fla-core").chunk_hgrn
    draw, shape = _draw(case, device), (case.batch, case.time, case.channels)
    inputs = draw(*shape), nn.functional.logsigmoid(draw(*shape))
    part = lambda v: v[:SEQUENCES, :STEPS, :CHANNELS]
    return _weightless(inputs, lambda x, g: run(x, g)[0], lambda x, g: linear(g.exp(), x), part)


def accelerated(case: Case, device: torch.device) -> Entry:
    """accelerated-scan's Triton kernel `scan(forget, inputs)`: h = forget h + inputs, in its own layout (B, C, T)."""
    run = _package("accelerated_scan.scalar", "accelerated-scan").scan
    draw, shape = _draw(case, device), (case.batch, case.channels, case.time)
    part = lambda v: v[:SEQUENCES, :CHANNELS, :STEPS]
    inputs = draw(*shape).sigmoid(), draw(*shape)
    return _weightless(inputs, run, lambda decay, x: linear(decay.mT, x.mT).mT, part)


def linear(decay: Tensor, x: Tensor) -> Tensor:
    """h_t = decay_t h_{t-1} + x_t, elementwise, on (B, T, C)."""
    h, ys = torch.zeros_like(x[:, 0]), []
    for d, v in zip(decay.unbind(1), x.unbind(1), strict=True):
        h = d * h + v
        ys.append(h)
    return torch.stack(ys, 1)


def gated_delta(case: Case, device: torch.device) -> Entry:
    """fla-core's `chunk_gated_delta_rule`: a linear recurrence of a matrix a head, C values in heads of `HEAD`."""
    run = _package("fla.ops.gated_delta_rule", "fla-core").chunk_gated_delta_rule
    draw, shape = _draw(case, device), (case.batch, case.time, case.channels // HEAD)
    q, k = (nn.functional.normalize(draw(*shape, HEAD), dim=-1) for _ in range(2))
    v, g, beta = draw(*shape, HEAD), nn.functional.logsigmoid(draw(*shape).float()), draw(*shape).sigmoid()
    part = lambda v: v[:SEQUENCES, :STEPS, :1]
    return _weightless((q, k, v, g, beta), lambda *inputs: run(*inputs)[0], delta_rule, part)


def delta_rule(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    """The gated delta rule: q, k (B, T, H, K), v (B, T, H, V), g, beta (B, T, H) -> (B, T, H, V). Yang et al. 2024.

    S = e^g S + beta k (v - (e^g S)^T k)^T,  y = S^T q / sqrt(K)
    """
    state, ys = q.new_zeros(*q[:, 0].shape, v.shape[-1]), []
    for q_t, k_t, v_t, g_t, beta_t in zip(*(a.unbind(1) for a in (q, k, v, g, beta)), strict=True):
        state = state * g_t.exp()[..., None, None]
        seen = torch.einsum("bhkv,bhk->bhv", state, k_t)
        state = state + torch.einsum("bhk,bhv->bhkv", k_t, beta_t[..., None] * (v_t - seen))
        ys.append(torch.einsum("bhkv,bhk->bhv", state, q_t))
    return torch.stack(ys, 1) * q.shape[-1] ** -0.5


def flashrnn(case: Case, device: torch.device) -> Entry:
    """FlashRNN's sequential LSTM in dense heads of `SMALL_HEAD`, by its Triton kernels (CUDA ones need nvcc), made to compile."""
    run = _package("flashrnn", "flashrnn").flashrnn
    _package("flashrnn.flashrnn.triton_fused.lstm_bw", "flashrnn").triton_tanh = tanh_of_short_types()
    draw, heads = _draw(case, device), (case.channels // SMALL_HEAD, SMALL_HEAD)
    x, b = draw(case.batch, case.time, 4, *heads), draw(4, *heads)
    w = draw(4, *heads, SMALL_HEAD) * case.sigma * SMALL_HEAD**-0.5
    forward = lambda x: run(x, w, b, function="lstm", backend="triton_fused", dtype=case.dtype)[0][0]
    pick = lambda tensors: [tensors[0][:SEQUENCES, :STEPS, :, :1], *(v[:, :1] for v in tensors[1:])]
    return Entry((x,), (w, b), forward, Truth(head_lstm, (x, w, b), lambda y: y[:SEQUENCES, :STEPS, :1], pick))


def tanh_of_short_types() -> Any:
    """FlashRNN's own formula of tanh, in float32: Triton 3.6 refuses the exponential of bfloat16 that its backward kernel takes."""
    import triton
    import triton.language as tl

    @triton.jit
    def tanh(x):
        e = tl.exp(-2.0 * x.to(tl.float32))
        return (1.0 - e) / (1.0 + e)

    return tanh


def head_lstm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    """FlashRNN's LSTM of one head: x (B, T, 4, 1, D), w (4, 1, D, D), b (4, 1, D) -> h (B, T, 1, D)."""
    identity = torch.eye(4 * x.shape[-1], dtype=x.dtype, device=x.device)
    weights = identity, w.flatten(0, 2), b.flatten(), torch.zeros_like(identity[0])
    return dense("LSTM", x.flatten(2), weights).unsqueeze(2)


def _weightless(inputs: tuple[Tensor, ...], run: Callable, loop: Callable, part: Callable[[Tensor], Tensor]) -> Entry:
    """An entry without weights, all inputs and the output of which are cut alike."""
    return Entry(inputs, (), run, Truth(loop, inputs, part, lambda tensors: [part(v) for v in tensors]))


def _draw(case: Case, device: torch.device) -> Callable[..., Tensor]:
    """`draw(*shape)` ~ N(0, 1) in the case's dtype."""
    generator = torch.Generator(device).manual_seed(3)
    return partial(torch.randn, generator=generator, device=device, dtype=case.storage)


def _package(module: str, package: str) -> Any:
    """An optional package's module. Raises `BackendError` where it is missing."""
    try:
        return importlib.import_module(module)
    except ImportError as e:
        raise BackendError(f"{e}: pip install {package}") from e


_ALL = (
    Contestant("scan-triton", partial(by_scan, "triton")),
    Contestant("scan-torch", partial(by_scan, "torch")),
    Contestant("scan-sequential", partial(by_scan, "triton", chunks=False)),
    Contestant("loop", partial(by_loop, False), longest=2048),
    Contestant("loop-graph", partial(by_loop, True), longest=2048),
    Contestant("loop-compiled", compiled, longest=512),
    Contestant("cudnn-gru", partial(cudnn, "GRU"), ("gru",), 2**14),
    Contestant("cudnn-lstm", partial(cudnn, "LSTM"), ("lstm",), 2**14),
    Contestant("pararnn-torch", partial(pararnn, True), ("gru", "lstm"), package="pararnn-torch"),
    Contestant("pararnn-torch-unchecked", partial(pararnn, False), ("gru", "lstm"), package="pararnn-torch"),
    Contestant("hgrn", hgrn, ("gru", "mingru"), package="fla-core"),
    Contestant("gated-delta", gated_delta, ("gru", "mingru"), package="fla-core"),
    Contestant("accelerated-scan", accelerated, ("gru", "mingru"), package="accelerated-scan"),
    Contestant("flashrnn", flashrnn, ("lstm", "headlstm/32"), package="flashrnn"),
)
CONTESTANTS = {contestant.name: contestant for contestant in _ALL}
