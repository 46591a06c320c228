"""Derivatives from the step: against torch.func and autograd on the plain function; digests; the proof of structure."""

import gc
import inspect
import multiprocessing
import threading

import pytest
import torch
from torch.nn.functional import softplus

import parashoot as ps
from oracle import CELLS, leaves, loop, random_problem
from parashoot import trace as tracing
from parashoot.cell import feature_shape, parameter_kinds, parameter_shapes
from parashoot.trace import trace

every_cell = pytest.mark.parametrize("name", CELLS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
CHANNELS, ROWS = 8, (3, 2)  # any leading axes


def trace_of(cell, dtype=torch.float64, channels=CHANNELS):
    shapes = [feature_shape(cell, channels) if s == (channels,) else s for s in parameter_shapes(cell, channels)]
    return trace(cell, dtype, torch.device("cpu"), feature_shape(cell, channels), tuple(shapes))


def point(cell, dtype, seed=0):
    """States, inputs (each (*ROWS, F)), parameters as a step gets them, and cotangents."""
    x, params, h = random_problem(cell, ROWS[0] * ROWS[1], 1, CHANNELS, dtype=dtype, seed=seed)
    shape = lambda v: v.reshape(*ROWS, *feature_shape(cell, CHANNELS))
    states, inputs = [shape(v) for v in h.unbind(1)], [shape(v) for v in x[:, 0].unbind(1)]
    params = [p.view(feature_shape(cell, CHANNELS)) if p.shape == (CHANNELS,) else p for p in params]
    return states, inputs, params, [torch.randn(v.shape, dtype=torch.float64).to(dtype) for v in states]


def step(cell, states, inputs, params):
    out = cell.step(*states, *inputs, *params)
    return (out,) if isinstance(out, torch.Tensor) else tuple(out)


def full_jacobian(cell, states, inputs, params, row):
    """d new / d old for one row over the flat (S, F), by torch.func.jacrev of the plain step."""
    one = lambda vs: torch.stack([v[row] for v in vs])
    old = one(states)
    jac = torch.func.jacrev(lambda h: torch.stack(step(cell, h.unbind(0), one(inputs).unbind(0), params)))(old)
    return jac.reshape(old.numel(), old.numel())


def expand(cell, entries, row):
    """The whole matrix over the flat (S, F) that the trace's Jacobian stands for."""
    slots, feature = len(cell.states), feature_shape(cell, CHANNELS)
    if cell.structure == "channelwise":
        out = torch.zeros(slots, CHANNELS, slots, CHANNELS, dtype=entries.dtype)
        for c in range(CHANNELS):
            out[:, c, :, c] = entries[(slice(None), slice(None), *row, c)]
        return out.reshape(slots * CHANNELS, -1)
    heads, width = feature if len(feature) == 2 else (1, *feature)
    out = torch.zeros(slots, heads, width, slots, heads, width, dtype=entries.dtype)
    for h in range(heads):
        out[:, h, :, :, h] = entries[(*row, h)].view(slots, width, slots, width)
    return out.reshape(slots * CHANNELS, -1)


def assert_close(got, want):
    rtol, atol = (1e-4, 1e-5) if want.dtype == torch.float32 else (1e-10, 1e-12)
    torch.testing.assert_close(got, want, rtol=rtol, atol=atol)


@every_cell
@dtypes
def test_jacobian_is_jacrev_of_the_step(name, dtype):
    cell = CELLS[name]
    states, inputs, params, _ = point(cell, dtype)
    found = trace_of(cell, dtype).jacobian(states, inputs, params)
    assert found.dtype == dtype
    for row in ((0, 0), (2, 1), (1, 0)):
        want = full_jacobian(cell, states, inputs, params, row)
        assert_close(expand(cell, found, row), want)


@every_cell
@dtypes
def test_vjp_and_pull_are_autograds(name, dtype):
    cell = CELLS[name]
    states, inputs, params, cots = point(cell, dtype, seed=1)
    live = [leaves(*vs) for vs in (states, inputs, params)]
    wanted = torch.autograd.grad(step(cell, *live), [v for vs in live for v in vs], cots, materialize_grads=True)
    found = trace_of(cell, dtype)
    d_inputs, d_params = found.vjp(states, inputs, params, cots)
    got = [*found.pull(states, inputs, params, cots), *d_inputs, *d_params]
    for g, w in zip(got, wanted, strict=True):
        assert_close(g.reshape(w.shape), w)


@every_cell
def test_a_trace_serves_any_leading_shape(name):
    cell = CELLS[name]
    states, inputs, params, cots = point(cell, torch.float64)
    found, rows = trace_of(cell), ROWS[0] * ROWS[1]
    flat = lambda vs: [v.reshape(rows, *v.shape[2:]) for v in vs]
    wide = found.jacobian(states, inputs, params)
    at = (slice(None), slice(None)) if cell.structure == "channelwise" else ()
    torch.testing.assert_close(wide[(*at, 2, 1)], found.jacobian(flat(states), flat(inputs), params)[(*at, 5)])
    of_rows = found.vjp(flat(states), flat(inputs), params, flat(cots))[1]
    torch.testing.assert_close(found.vjp(states, inputs, params, cots)[1], of_rows)


@every_cell
def test_the_canonical_graph_computes_the_step(name):
    cell = CELLS[name]
    found = trace_of(cell)
    if cell.structure == "dense":
        assert found.graph is None
        return
    states, inputs, params, _ = point(cell, torch.float64)
    if cell.structure == "headwise":
        states, inputs = ([v.flatten(0, 1) for v in vs] for vs in (states, inputs))
    cotangents = [None] * len(states)
    assert found.graph is not None
    new = found.graph.compile(torch.float64)(*states, *inputs, *params, *cotangents)[: len(states)]
    for got, want in zip(new, step(cell, states, inputs, params), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-13)


PRODUCTS = {
    "einsum": lambda R, h: torch.einsum("hij,...hj->...hi", R, h),
    "the other way round": lambda R, h: torch.einsum("...hj,hij->...hi", h, R),
    "matmul": lambda R, h: torch.matmul(R, h[..., None])[..., 0],
    "rows": lambda R, h: torch.matmul(h[..., None, :], R.mT).squeeze(-2),
    "sum": lambda R, h: (R * h[..., None, :]).sum(-1),
}


@pytest.mark.parametrize("form", PRODUCTS)
def test_products_by_matrices_are_one_operation_in_every_form(form):
    """However they are written, and their derivatives: a product by the transpose, and one outer product."""
    product = PRODUCTS[form]

    @ps.cell(structure="headwise", width=4)
    def heads(h: ps.State, x: ps.Input, R: ps.Param, p: ps.Param):
        return torch.tanh(product(R, p * h) + x)

    found = trace_of(heads)
    assert found.graph is not None and found.adjoint is not None
    assert [op for op, _ in found.graph.ops.values()] == ["mul", "mix", "add", "tanh"]
    assert [op for op, _ in found.adjoint.ops.values()].count("mix_t") == 1
    assert found.pairs == (1, None)


def test_a_mean_over_a_head_is_a_sum_of_its_channels():
    @ps.cell(structure="headwise", width=4)
    def centered(h: ps.State, x: ps.Input):
        return torch.tanh(h - h.mean(-1, keepdim=True) + x)

    found = trace_of(centered)
    assert found.graph is not None and found.adjoint is not None
    assert [op for op, _ in found.graph.ops.values()] == ["total", "mul", "sub", "add", "tanh"]
    assert [op for op, _ in found.adjoint.ops.values()].count("total") == 2  # of the state, and of the gradient


def test_mixing_that_is_neither_by_a_matrix_nor_a_sum_is_named():
    @ps.cell(structure="headwise", width=4)
    def running(h: ps.State, x: ps.Input):
        return torch.tanh(h.cumsum(-1) + x)

    found = trace_of(running)
    assert found.graph is None and found.foreign


def test_a_trace_is_made_once():
    assert trace_of(CELLS["lstm"]) is trace_of(CELLS["lstm"])


def define(body, *arguments):
    """A cell from source, its states named h*, inputs x*, parameters p*."""
    roles = {"h": "State", "x": "Input", "p": "Param"}
    signature = ", ".join(f"{a}: ps.{roles[a[0]]}" for a in arguments)
    namespace: dict = {"ps": ps, "torch": torch}
    exec(f"def step({signature}):\n    {body}\n", namespace)
    return ps.cell(namespace["step"])


def digest(body, *arguments):
    return trace_of(define(body, *arguments)).digest


def test_digest_is_of_the_mathematics():
    """The same under other names and ways to write it; another for another constant, operation, order or output."""
    base = digest("return torch.tanh(pa * ha + 0.5 * xa)", "ha", "xa", "pa")
    assert digest("return torch.tanh(pb * hb + 0.5 * xb)", "hb", "xb", "pb") == base
    assert digest("u = pa * ha; return (u + 0.5 * xa).tanh()", "ha", "xa", "pa") == base
    assert digest("unused = torch.exp(xa); return torch.tanh(pa * ha + 0.5 * xa)", "ha", "xa", "pa") == base
    others = [
        digest("return torch.tanh(pa * ha + 0.25 * xa)", "ha", "xa", "pa"),
        digest("return torch.sigmoid(pa * ha + 0.5 * xa)", "ha", "xa", "pa"),
        digest("return torch.tanh(pa * ha - 0.5 * xa)", "ha", "xa", "pa"),
        digest("return torch.tanh(pa * xa + 0.5 * ha)", "ha", "xa", "pa"),
        digest("return torch.tanh(pa * ha + 0.5 * xb)", "ha", "xa", "xb", "pa"),
    ]
    assert len({base, *others}) == 1 + len(others)


def test_digest_depends_on_the_output_state():
    def two(a: ps.State, b: ps.State, x: ps.Input):
        return torch.tanh(a + x), torch.tanh(b - x)

    assert trace_of(ps.cell(two)).digest != trace_of(ps.cell(output="a")(two)).digest


# Steps that are not what they are declared to be. The message names the operation and the line.


def mean_over_channels(h: ps.State, x: ps.Input):
    centred = h - h.mean(-1, keepdim=True)
    return torch.tanh(centred + x)


def cumulative(h: ps.State, x: ps.Input):
    return torch.tanh(h + x.cumsum(-1))


def flipped(h: ps.State, x: ps.Input):
    return torch.tanh(h.flip(-1) + x)


def rolled(h: ps.State, x: ps.Input):
    return torch.tanh(torch.roll(h, 1, -1) + x)


def gram(h: ps.State, x: ps.Input):
    return torch.tanh((h @ h.mT) @ h + x)


def softmax(h: ps.State, x: ps.Input):
    return torch.softmax(h, -1) + x


def sorted_channels(h: ps.State, x: ps.Input):
    return torch.tanh(h.sort(-1).values + x)


def constants_by_channel(h: ps.State, x: ps.Input):
    return h * torch.arange(h.shape[-1]) + x


def mean_over_sequences(h: ps.State, x: ps.Input):
    return torch.tanh(h - h.mean(0, keepdim=True) + x)


MIXING = {
    mean_over_channels: ("mean", "h.mean(-1, keepdim=True)"), cumulative: ("cumsum", "x.cumsum(-1)"), flipped: ("flip", "h.flip(-1)"),
    rolled: ("", ""), gram: ("", "h @ h.mT"), softmax: ("softmax", "torch.softmax(h, -1)"), sorted_channels: ("sort", "h.sort(-1)"),
    constants_by_channel: ("arange", "torch.arange(h.shape[-1])"), mean_over_sequences: ("mean", "h.mean(0, keepdim=True)"),
}  # fmt: skip


@pytest.mark.parametrize("mixing", MIXING, ids=lambda f: f.__name__)
def test_a_channelwise_cell_that_mixes_is_refused(mixing):
    cell, (operation, code) = ps.cell(mixing), MIXING[mixing]
    x = torch.zeros(2, 6, 1, 4)
    with pytest.raises(ps.StructureError) as raised:
        ps.scan(cell, x)
    message = str(raised.value)
    assert f"cell '{mixing.__name__}' is not channelwise" in message
    assert operation in message and "headwise" in message and "dense" in message
    lines, first = inspect.getsourcelines(mixing)
    number = first + next(k for k, line in enumerate(lines) if code in line)
    assert f"{__file__}:{number}: {lines[number - first].strip()}" in message or not code


def test_a_matrix_product_declared_channelwise_is_refused():
    @ps.cell
    def matrix(h: ps.State, x: ps.Input, W: ps.Param):
        return torch.tanh(h @ W.mT + x)

    with pytest.raises(
        (ps.StructureError, ps.CellError), match=r"cell 'matrix'.*structure='headwise'.*'dense'"
    ) as raised:
        ps.scan(matrix, torch.zeros(2, 6, 1, 4), (torch.zeros(4),))
    assert "mT" in str(raised.value) or "matmul" in str(raised.value) or "h @ W" in str(raised.value)


def heads_mix(h: ps.State, x: ps.Input, R: ps.Param):
    return torch.tanh(torch.einsum("hij,...hj->...hi", R, h) + x + h.mean(-2, keepdim=True))


def sequences_mix_in_heads(h: ps.State, x: ps.Input, R: ps.Param):
    return torch.tanh(torch.einsum("hij,...hj->...hi", R, h) + x.mean(0, keepdim=True))


def second_state_mixes(a: ps.State, b: ps.State, x: ps.Input):
    return torch.tanh(a + x), torch.tanh(b + a.cumsum(-2))


def sequences_mix_when_dense(h: ps.State, x: ps.Input, W: ps.Param):
    return torch.tanh(h @ W.mT + x + h.flip(0))


@pytest.mark.parametrize(
    ("mixing", "structure", "message"),
    [
        (heads_mix, "headwise", "its state 'h' in one head depends on another: heads must not mix"),
        (second_state_mixes, "headwise", "its state 'b' in one head depends on another"),
        (
            sequences_mix_in_heads,
            "headwise",
            "its state 'h' in one sequence depends on another: sequences must not mix",
        ),
        (sequences_mix_when_dense, "dense", "its state 'h' in one sequence depends on another"),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_declared_structures_are_checked(mixing, structure, message):
    cell = ps.cell(mixing, structure=structure, width=2 if structure == "headwise" else None)
    params = [torch.zeros(s) for s in parameter_shapes(cell, 4)]
    with pytest.raises(ps.StructureError, match=f"cell '{mixing.__name__}' is declared {structure}, but {message}"):
        ps.scan(cell, torch.zeros(2, 6, 1, 4), tuple(params) or None)


def test_parameter_kinds():
    @ps.cell(structure="headwise", width=3)
    def mixed(h: ps.State, x: ps.Input, a: ps.Param, R: ps.Param, b: ps.Param):
        return torch.tanh(a * torch.einsum("hij,...hj->...hi", R, h) + x + b)

    assert parameter_kinds(mixed) == ("vector", "matrix", "vector")
    assert parameter_shapes(mixed, 12) == [(12,), (4, 3, 3), (12,)]
    assert parameter_kinds(CELLS["headgru"]) == ("matrix",) * 3
    assert parameter_shapes(CELLS["elman"], 6) == [(6, 6)]
    assert parameter_kinds(CELLS["slstm"]) == ("vector",) * 4
    assert parameter_kinds(CELLS["mingru"]) == ()

    @ps.cell(structure="dense")
    def impossible(h: ps.State, x: ps.Input, w: ps.Param):
        return torch.nn.functional.conv2d(h, w) + x

    with pytest.raises(ps.CellError, match="cell 'impossible': the step runs with no choice of vector or matrix"):
        parameter_kinds(impossible)


def test_an_operation_that_a_graph_cannot_repeat_is_named():
    @ps.cell
    def gamma(h: ps.State, x: ps.Input):
        return 0.1 * torch.digamma(0.1 * h * h + 1) + x

    with pytest.raises(ps.CellError, match=r"its canonical graph does not run: .*polygamma"):
        ps.scan(gamma, torch.randn(1, 8, 1, 3))


def test_a_step_may_call_other_functions_and_use_python_numbers():
    def gate(v, gain):
        return torch.sigmoid(gain * v) if gain > 1 else softplus(v)

    @ps.cell
    def calls(h: ps.State, x: ps.Input):
        return sum(gate(h + x, g) for g in (0.5, 2.0)) / 3 - h**3 / 7

    states, inputs = [torch.linspace(-1, 1, 8).double()], [torch.linspace(1, -2, 8).double()]
    want = torch.autograd.functional.jacobian(lambda h: step(calls, [h], inputs, [])[0], states[0]).diagonal()
    torch.testing.assert_close(trace_of(calls).jacobian(states, inputs, [])[0, 0], want)


def test_one_thread_that_stays_makes_all_traces_and_a_fork_has_its_own(monkeypatch):
    """Fake tensors outlive a thread badly in CUDA builds of PyTorch without a GPU, and a fork has only the thread that forked."""
    found = set()
    make_fx = tracing.make_fx
    monkeypatch.setattr(tracing, "make_fx", lambda *a, **k: found.add(threading.current_thread()) or make_fx(*a, **k))
    for dtype in (torch.float32, torch.float64):
        monkeypatch.setattr(tracing, "_traces", {})
        caller = threading.Thread(target=trace_of, args=(ps.cells.gru, dtype))
        caller.start()
        caller.join()
    assert len(found) == 1 and found.pop().is_alive()
    monkeypatch.setattr(tracing, "_traces", {})
    monkeypatch.setattr(tracing, "_trace_channelwise", lambda *_: None)  # autograd refuses a fork where it had threads
    child = multiprocessing.get_context("fork").Process(target=trace_of, args=(ps.cells.gru,), daemon=True)
    child.start()
    child.join(30)
    assert child.exitcode == 0


def test_garbage_is_collected_as_before_after_a_trace_that_fails():
    @ps.cell
    def fails(h: ps.State, x: ps.Input):
        raise RuntimeError(f"on purpose, collecting: {gc.isenabled()}")

    for enabled in (True, False):
        gc.enable() if enabled else gc.disable()
        try:
            with pytest.raises(ps.CellError, match="on purpose, collecting: False"):
                ps.scan(fails, torch.zeros(1, 2, 1, 3))
            assert gc.isenabled() is enabled
        finally:
            gc.enable()


def test_constants_keep_their_kind_and_sign():
    @ps.cell
    def chosen(h: ps.State, u: ps.Input, x: ps.Input):
        one = torch.where(h > 0, 1.0, 0.0)
        both = torch.where(h > 0, True, False) & (x > 0)
        return one * u + torch.where(both, 0.3, 0.1)

    @ps.cell
    def signed(h: ps.State, x: ps.Input):
        return 0.5 * h + torch.tanh(1.0 / torch.where(x > 0, 0.0, -0.0)) * torch.where(x > 0, -0.0, 1.0)

    @ps.cell
    def raised(h: ps.State, x: ps.Input):
        return 0.5 * h + torch.pow(-2.0, x)

    x = torch.tensor([1.0, 2.0, 3.0, 0.0]).view(1, 4, 1, 1)
    assert ps.scan(raised, x)[0].flatten().tolist() == [-2.0, 3.0, -6.5, -2.25]
    for cell in (chosen, signed):
        x = torch.randn(1, 40, len(cell.inputs), 3, dtype=torch.float64)
        torch.testing.assert_close(ps.scan(cell, x)[0], loop(cell, x, [], x.new_zeros(1, 1, 3))[:, :, 0])


@pytest.mark.parametrize("function", [torch.hypot, torch.atan2])
def test_functions_of_tensors_take_constant_ones(function):
    @ps.cell
    def against(h: ps.State, x: ps.Input):
        return 0.5 * torch.tanh(function(h, torch.ones_like(h)) + function(torch.full_like(x, 2.0), x))

    x, found = torch.randn(2, 40, 1, 3, dtype=torch.float64), []
    for run in (lambda x: ps.scan(against, x)[0], lambda x: loop(against, x, [], x.new_zeros(2, 1, 3))[:, :, 0]):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        found.append((y.detach(), *torch.autograd.grad(y.sin().sum(), leaf)))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize("size", [1e-30, 1e-10, 1.0, 1e20])
def test_hypot_neither_overflows_nor_vanishes(size):
    @ps.cell
    def far(h: ps.State, x: ps.Input):
        return torch.hypot(x, 0.5 * x) + 0.0 * h

    x = torch.tensor([[1.0, -1.0]]).view(1, 2, 1, 1).mul(size).requires_grad_()
    y = ps.scan(far, x)[0]
    (grad,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(y.detach().flatten() / size, torch.full((2,), 1.25**0.5))
    torch.testing.assert_close(grad.flatten(), torch.tensor([1.25**0.5, -(1.25**0.5)]))


def test_what_pytorch_writes_on_its_own_is_no_step_that_writes_in_place():
    @ps.cell(structure="headwise", width=4)
    def normed(h: ps.State, x: ps.Input):
        return torch.tanh(0.5 * torch.nn.functional.rms_norm(h, h.shape[-1:]) + x)

    @ps.cell
    def near(h: ps.State, x: ps.Input):
        return torch.where(torch.isclose(h, x), 0.1 * h, 0.5 * h + x)

    for cell in (normed, near):
        x = torch.randn(2, 40, 1, 8, dtype=torch.float64)
        torch.testing.assert_close(ps.scan(cell, x)[0], loop(cell, x, [], x.new_zeros(2, 1, 8))[:, :, 0])


@pytest.mark.parametrize("name", ["softshrink", "hardshrink"])
def test_derivatives_that_pytorch_does_not_take_apart(name):
    shrink = getattr(torch.nn.functional, name)

    @ps.cell
    def shrunk(h: ps.State, x: ps.Input, p: ps.Param):
        return shrink(p * h + x, 0.2)

    x, p = torch.randn(2, 200, 1, 4), torch.full((1, 4), 0.6)
    assert ps.verify(shrunk, x, p, solver=ps.MultipleShooting(16)).passed
    assert "tl.where" in shrunk.triton_source("backward")
