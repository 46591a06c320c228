"""The operator inside PyTorch's own machinery: opcheck, torch.compile, autocast, checkpointing, gradient modes."""

import contextlib

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

import parashoot as ps
from oracle import ONE_OF_EACH, by_loop, gradients, leaves, loop, random_problem, random_resets, relative
from parashoot.op import encode

every_structure = pytest.mark.parametrize("structure", ONE_OF_EACH)


@pytest.mark.parametrize("report", [True, False])
@every_structure
@pytest.mark.parametrize(
    "options", [(None, False, False), (random_resets(2, 12), True, True)], ids=["plain", "reset, reverse, states"]
)
def test_opcheck(structure, options, report):
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 12, 8, dtype=torch.float32)
    x, h0, *params = leaves(x, h0, *params)
    reset, reverse, all_states = options
    arguments = (x, params, h0, reset, cell.key, reverse, all_states, True, report, *encode(ps.MultipleShooting(5)))
    torch.library.opcheck(torch.ops.parashoot.scan.default, arguments)


@pytest.fixture
def compiled():
    """torch.compile without code generation: the whole function in one graph, forward and backward."""
    torch._dynamo.reset()
    yield lambda f: torch.compile(f, fullgraph=True, backend="aot_eager")
    torch._dynamo.reset()


@every_structure
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_a_compiled_model_equals_eager(structure, dtype, compiled):
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 33, 8, dtype=dtype)
    reset = random_resets(2, 33)

    def run(x, params, h0):
        y, h_n = ps.scan(cell, torch.sin(x), tuple(params), h0, reset=reset, solver=ps.MultipleShooting(8))
        return torch.cos(y), h_n

    fast = compiled(run)
    for got, want in zip(fast(x, params, h0), run(x, params, h0), strict=True):
        assert torch.equal(got, want)
    dy, dh = torch.randn(2, 33, 8).to(dtype), torch.randn(h0.shape).to(dtype)
    for got, want in zip(gradients(fast, x, params, h0, dy, dh), gradients(run, x, params, h0, dy, dh), strict=True):
        assert got.dtype == want.dtype and relative(got, want) <= 1e-6


@every_structure
def test_compiled_with_info(structure, compiled):
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 33, 8)

    def run(x, params, h0):
        return ps.scan(cell, x, tuple(params), h0, solver=ps.MultipleShooting(8), return_info=True)

    y, _h_n, info = compiled(run)(x, params, h0)
    torch.testing.assert_close(y, loop(cell, x, params, h0)[:, :, cell.output], rtol=0, atol=1e-9)
    assert info.to_dict() == run(x, params, h0)[2].to_dict()
    assert info.iterations >= 2 and info.chunk_length == 8


@every_structure
@pytest.mark.usefixtures("compiled")
def test_compiled_once_for_any_length(structure, compiled):
    cell = ONE_OF_EACH[structure]

    def run(x, params, h0):
        return ps.scan(cell, x, tuple(params), h0)

    backend = CompileCounterWithBackend("aot_eager")
    fast = torch.compile(run, fullgraph=True, dynamic=True, backend=backend)
    for time in (40, 17, 65):
        x, params, h0 = random_problem(cell, 2, time, 8)
        dy, dh = torch.randn(2, time, 8).double(), torch.randn(h0.shape).double()
        got = gradients(fast, x, params, h0, dy, dh)
        for g, w in zip(got, gradients(by_loop(cell), x, params, h0, dy, dh), strict=True):
            assert relative(g, w) <= 1e-9
    assert backend.frame_count == 1


def test_a_wrong_argument_inside_compile_is_still_refused(compiled):
    cell = ONE_OF_EACH["channelwise"]
    x, params, h0 = random_problem(cell, 2, 9, 8)
    fast = compiled(lambda x: ps.scan(cell, x, tuple(params), h0[:, :1]))
    with pytest.raises(Exception, match="h0: got"):
        fast(x)


@every_structure
@pytest.mark.parametrize("solver", [None, ps.MultipleShooting(8)], ids=["auto", "8"])
def test_autocast_leaves_the_recurrence_in_fp32(structure, solver):
    """Forward and backward, also where backward runs inside the context."""
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 33, 8, dtype=torch.float32)
    dy, dh = torch.randn(2, 33, 8), torch.randn(h0.shape)
    run = lambda x, p, h: ps.scan(cell, x, tuple(p), h, solver=solver)
    want = [*run(x, params, h0), *gradients(run, x, params, h0, dy, dh)]
    with torch.autocast("cpu", torch.bfloat16):
        got = [*run(x, params, h0), *gradients(run, x, params, h0, dy, dh)]
    for g, w in zip(got, want, strict=True):
        assert g.dtype == w.dtype and relative(g, w) <= 1e-5


@every_structure
def test_autocast_around_a_model(structure):
    """A linear layer gives bf16 inputs, parameters stay fp32: y is bf16, parameter gradients are fp32."""
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 33, 8, dtype=torch.float32)
    linear = torch.nn.Linear(8, len(cell.inputs) * 8)
    h0, *params = leaves(h0, *params)
    with torch.autocast("cpu", torch.bfloat16):
        inputs = linear(x[:, :, 0]).unflatten(2, (-1, 8))
        y, h_n = ps.scan(cell, inputs, tuple(params), h0)
    assert inputs.dtype == y.dtype == torch.bfloat16 and h_n.dtype == torch.float32
    y.float().sum().backward()
    exact = inputs.detach().double(), [p.detach().double() for p in params], h0.detach().double()
    want = gradients(by_loop(cell), *exact, torch.ones(2, 33, 8).double(), None)
    for p, w in zip([*params, h0], want[1:], strict=True):
        assert p.grad is not None and p.grad.dtype == torch.float32 and relative(p.grad, w) <= 2**-8
    grad = linear.weight.grad
    assert grad is not None and grad.dtype == torch.float32 and bool((grad != 0).any())


@every_structure
def test_checkpointing(structure):
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 33, 8)
    dy, dh = torch.randn(2, 33, 8).double(), torch.randn(h0.shape).double()
    again = lambda x, p, h: checkpoint(
        lambda x, h, *p: ps.scan(cell, torch.sin(x), p, h), x, h, *p, use_reentrant=False
    )
    want = gradients(lambda x, p, h: by_loop(cell)(torch.sin(x), p, h), x, params, h0, dy, dh)
    for g, w in zip(gradients(again, x, params, h0, dy, dh), want, strict=True):
        assert relative(g, w) <= 1e-9


@every_structure
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_without_gradients(structure, mode):
    """Also for a step that is seen here for the first time: its derivatives are traced all the same."""
    fresh = ps.cell(ONE_OF_EACH[structure].step, structure=structure, width=ONE_OF_EACH[structure].width)
    x, params, h0 = random_problem(fresh, 2, 33, 8)
    x, h0, *params = leaves(x, h0, *params)
    with mode():
        y, h_n = ps.scan(fresh, x, tuple(params), h0, solver=ps.MultipleShooting(8))
    assert not y.requires_grad and not h_n.requires_grad and y.grad_fn is None
    want = loop(fresh, x, params, h0).detach()
    torch.testing.assert_close(y, want[:, :, fresh.output], rtol=0, atol=1e-9)
    run = lambda x, p, h: ps.scan(fresh, x, tuple(p), h)
    dy = torch.ones(2, 33, 8).double()
    after, by_the_loop = gradients(run, x, params, h0, dy, None), gradients(by_loop(fresh), x, params, h0, dy, None)
    assert all(relative(g, w) <= 1e-9 for g, w in zip(after, by_the_loop, strict=True))


@contextlib.contextmanager
def low_precision_by_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def sigmoids_are_kept():
    """As selective checkpointing does it: what runs under it once has to run again, in that order."""
    keep = [torch.ops.aten.sigmoid.default, torch.ops.aten.relu.default]
    before, _ = create_selective_checkpoint_contexts(keep)
    with before:
        yield
    assert not any(before.storage[op] for op in keep)  # of a trace


@pytest.mark.parametrize(
    "around",
    [low_precision_by_default, lambda: torch.device("meta"), sigmoids_are_kept],
    ids=["dtype", "device", "kept"],
)
def test_what_the_caller_has_set_does_not_reach_a_trace(around):
    def kinked(h: ps.State, x: ps.Input):
        return torch.relu(0.5 * h + x)

    def smooth(h: ps.State, x: ps.Input):
        return torch.sigmoid(0.5 * h + x)

    x = torch.randn(1, 40, 1, 3)
    for cell in (ps.cell(kinked), ps.cell(smooth)):
        with around():
            assert ps.explain(cell, x).plan.backend == "torch"
        want = loop(cell, x.double(), [], torch.zeros(1, 1, 3).double())[:, :, 0]
        torch.testing.assert_close(ps.scan(cell, x)[0].double(), want)


def test_recording_by_torchscript_is_refused():
    with pytest.raises(ps.BackendError, match=r"Use torch\.export"):
        torch.jit.trace(ps.ParaGRU(6, 8), (torch.randn(2, 256, 6),))


def test_functional_transforms_of_a_scan_are_refused():
    x = torch.randn(1, 256, 3, 4)
    loss = lambda params: ps.scan(ps.cells.gru, x, params, solver=ps.MultipleShooting(16))[0].sum()
    with pytest.raises(ps.GradientError, match=r"ps\.scan under torch\.func\.grad"):
        torch.func.grad(loss)(torch.randn(3, 4))


@every_structure
def test_functional_transforms_of_the_step_see_plain_pytorch(structure):
    """`cell(...)` is the plain function, whatever was traced of it before."""
    cell = ONE_OF_EACH[structure]
    x, params, h0 = random_problem(cell, 2, 5, 8)
    ps.scan(cell, x, tuple(params), h0)
    split = (lambda v: v.unflatten(-1, (-1, cell.width))) if cell.width else (lambda v: v)
    states, inputs = split(h0).unbind(1), split(x[:, 0]).unbind(1)
    new = cell(*states, *inputs, *params)
    new = [new] if isinstance(new, torch.Tensor) else new
    tangents = torch.func.jvp(
        lambda *h: cell(*h, *inputs, *params), tuple(states), tuple(torch.ones_like(s) for s in states)
    )[0]
    tangents = [tangents] if isinstance(tangents, torch.Tensor) else tangents
    assert all(torch.equal(a, b) for a, b in zip(new, tangents, strict=True))
